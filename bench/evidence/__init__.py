"""What a trained pruner's tokens are worth on real features, beside selectors without training."""
