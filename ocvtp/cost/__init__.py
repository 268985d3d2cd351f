"""What every part of a model costs, counted without running it; sizes of published models."""
