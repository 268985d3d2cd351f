"""A server of vLLM under load, unpruned and pruned: requests a second, first token, CPU time, KV cache."""
