"""The kernels as Hugging Face's `kernels` loads them: ``python -m bench.hub_kernel``, of the standard library
alone. The layout is that of kernels 0.17 (docs/source/kernel-requirements.md in huggingface/kernels)."""
