"""Counts that a noisy machine can't disturb: launches, FLOPs, allocations, host synchronisations. No timing.

``python -m bench.guard`` counts them, mostly on tensors without data, and compares them with
``bench/results/counts/guard.json``; ``--write`` accepts what was counted. ``tests/test_guard.py`` does the
same in ``make test``.
"""
