"""Fused operations for object-centric vision-token pruning.

Each operation lives in a folder of its own: ``reference.py`` is plain PyTorch and defines what is
correct; the public function in ``__init__.py`` checks its arguments and picks a backend. The package
depends on torch alone (and on triton once a kernel is asked for) and never on ``ocvtp``.

Sizes in shapes: ``B`` images, ``N`` tokens per image, ``K`` slots, ``C`` token width, ``D`` slot width.
"""

from ocvtp_kernels._backend import Backend, BackendUnavailableError

__all__ = ["Backend", "BackendUnavailableError"]
