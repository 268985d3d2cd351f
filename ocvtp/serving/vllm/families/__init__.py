"""A module for each of vLLM's models that has a pruned twin, and for what some of them share."""
