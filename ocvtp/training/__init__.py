"""Training of pruners: images, features, recipe, trainer. Import what you need from the modules."""
