"""What plugs into training: augmentation, consistency models, experts, another network."""
