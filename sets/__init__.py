"""How each released data set lies on disk, and image files packed to one array."""
