"""What the wings of this package say to each other."""
