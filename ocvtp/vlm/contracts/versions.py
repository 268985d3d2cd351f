"""Differences between transformers releases, looked up when needed (importing transformers takes seconds)."""

from __future__ import annotations


def transformers_older_than(version: str) -> bool:
    """Whether the installed transformers is older than ``version``."""
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) < Version(version)
