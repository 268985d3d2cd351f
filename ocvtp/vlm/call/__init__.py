"""The same call on a shorter prompt."""
