"""Vision encoders, run layer by layer."""
