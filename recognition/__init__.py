"""Long-tailed recognition (Sec. G.5, G.11), and classifiers as feature networks."""
