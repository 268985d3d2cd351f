"""Microbenchmarks of the fused operations: ``python -m pytest bench/micro [--record]``.

Every row is one implementation of one operation at one shape, timed only after its results passed a gate on
the very inputs that are timed. On a GPU: real shapes, CUDA graphs and eager calls, floors. On a CPU: PyTorch
alone at one image, which tells nothing about the kernels.
"""
