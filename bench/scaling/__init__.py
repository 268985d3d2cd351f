"""Cost against the number of tokens, kept tokens, images and frames; and where pruning does not pay."""
