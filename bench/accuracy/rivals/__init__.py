"""Rival methods on the questions of :mod:`bench.accuracy`, each as a user has it: through ``ocvtp.apply``."""
