"""An environment with vLLM, apart from ours: vLLM pins torch, transformers and some hundred others."""
