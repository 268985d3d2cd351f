"""``torch.nn.DataParallel`` is refused: its copies of a patched model would compute with the first's weights.

It copies a model's attributes as they are, so methods on the instance stay bound to the model copied from.
"""

from __future__ import annotations

import types
from typing import Any

from ocvtp.vlm.call.controller import ATTRIBUTE
from ocvtp.vlm.contracts.errors import PatchError

#: What ``DataParallel`` asks a module for.
_COPY = "_replicate_for_data_parallel"


def refuse_replicas(model: Any) -> None:
    """Have a patched model raise when ``DataParallel`` copies it."""
    model.__dict__[_COPY] = types.MethodType(_refuse, model)


def allow_replicas(model: Any) -> None:
    """Undo :func:`refuse_replicas`."""
    model.__dict__.pop(_COPY, None)


def _refuse(self: Any) -> Any:
    controller = self.__dict__.get(ATTRIBUTE)
    if controller is not None and controller.enabled:
        raise PatchError(
            f"a {type(self).__name__} patched by ocvtp can't run in torch.nn.DataParallel, which the Trainer "
            "uses where it sees several GPUs: let it see one (CUDA_VISIBLE_DEVICES=0), or start one process "
            "per GPU (torchrun, accelerate launch), or ocvtp.remove(model) first"
        )
    return getattr(type(self), _COPY)(self)
