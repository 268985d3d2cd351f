"""What goes wrong while patching a model."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """No adapter knows this model, or not this variant of it (its vision tower, say)."""


class PatchError(RuntimeError):
    """The patch can't be installed, or is needed and isn't there."""
