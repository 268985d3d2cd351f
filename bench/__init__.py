"""Benchmarks. Every figure comes with a correctness gate passed in the same run."""
