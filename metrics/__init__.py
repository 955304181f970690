"""From images to numbers: features, distances, which images are compared."""
