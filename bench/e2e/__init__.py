"""Whole models, unpruned and pruned by several methods: time to the first token, decoding, memory."""
