"""The area-weighted error for PyTorch: operator schemas, fakes, gradient, FLOPs."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp_kernels._device import without_autocast
from ocvtp_kernels._library import define, fold_images, handle_function
from ocvtp_kernels._transforms import tangent_rule, transformed
from ocvtp_kernels.reconstruction import reference

__all__ = ["area_weighted_mse"]


def _launch(
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    slot_attention: torch.Tensor,
    exclude_empty: bool,
    power: float,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.reconstruction import triton as kernels

    return kernels.area_weighted_mse(reconstruction, features, slot_attention, exclude_empty, power, cap)


def _fake(
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    slot_attention: torch.Tensor,
    exclude_empty: bool,
    power: float,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, _ = reconstruction.shape
    return (
        reconstruction.new_empty(batch, dtype=torch.float32),
        reconstruction.new_empty(batch, tokens, dtype=torch.float32),
        reconstruction.new_empty(batch, dtype=torch.float32),
    )


def _flops(reconstruction: Any, features: Any, slot_attention: Any, *_: Any, **__: Any) -> int:
    """A difference, its square and their sum; and a token's weight, a product of map and slots' weights."""
    batch, tokens, width = reconstruction
    return int(batch * tokens * (3 * width + 2 * slot_attention[1]))


_area_weighted_mse = define(
    "area_weighted_mse(Tensor reconstruction, Tensor features, Tensor slot_attention, bool exclude_empty,"
    " float power, float cap) -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    _flops,
)


def _launch_backward(
    grad: torch.Tensor,
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    weights: torch.Tensor,
    total: torch.Tensor,
    wants_reconstruction: bool,
    wants_features: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from ocvtp_kernels.reconstruction import triton as kernels

    return kernels.area_weighted_mse_backward(
        grad, reconstruction, features, weights, total, wants_reconstruction, wants_features
    )


def _fake_backward(
    grad: torch.Tensor,
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    weights: torch.Tensor,
    total: torch.Tensor,
    wants_reconstruction: bool,
    wants_features: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = reconstruction.shape
    return (
        reconstruction.new_empty(shape if wants_reconstruction else (0,)),
        features.new_empty(shape if wants_features else (0,)),
    )


def _backward_flops(grad: Any, reconstruction: Any, *_: Any, **__: Any) -> int:
    """A difference and a product."""
    batch, tokens, width = reconstruction
    return int(2 * batch * tokens * width)


_area_weighted_mse_backward = define(
    "area_weighted_mse_backward(Tensor grad, Tensor reconstruction, Tensor features, Tensor weights,"
    " Tensor total, bool wants_reconstruction, bool wants_features) -> (Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
    _backward_flops,
)


class _AreaWeightedMse(torch.autograd.Function):
    """The kernels, forward and backward. The map only weighs: it has no gradient.

    Kept in between are the two inputs, the tokens' weights and their sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        reconstruction: torch.Tensor,
        features: torch.Tensor,
        slot_attention: torch.Tensor,
        exclude_empty: bool,
        power: float,
        cap: float,
    ) -> torch.Tensor:
        loss, weights, total = _area_weighted_mse(
            reconstruction, features, slot_attention, exclude_empty, power, cap
        )
        ctx.save_for_backward(reconstruction, features, weights, total)
        return loss

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        wants_reconstruction, wants_features = ctx.needs_input_grad[:2]
        arguments = grad, *ctx.saved_tensors
        # To be differentiated again, by autograd or with dual numbers: through the formula.
        if torch.is_grad_enabled() or transformed(*arguments):
            with without_autocast(grad.device):
                grads = reference.area_weighted_mse_backward(*arguments)
        else:
            grads = _area_weighted_mse_backward(*arguments, wants_reconstruction, wants_features)
        of_reconstruction = grads[0] if wants_reconstruction else None
        of_features = grads[1] if wants_features else None
        return of_reconstruction, of_features, None, None, None, None


handle_function(_AreaWeightedMse, _flops)


class _AreaWeightedMseTransformed(_AreaWeightedMse):
    """The same for torch.func and dual numbers; derivatives by the formulas."""

    @staticmethod
    def forward(  # type: ignore[override]
        reconstruction: torch.Tensor,
        features: torch.Tensor,
        slot_attention: torch.Tensor,
        exclude_empty: bool,
        power: float,
        cap: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _area_weighted_mse(reconstruction, features, slot_attention, exclude_empty, power, cap)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, weights, total = output
        ctx.mark_non_differentiable(weights, total)
        ctx.save_for_backward(*inputs[:2], weights, total)
        ctx.save_for_forward(*inputs[:2], weights, total)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, *_: None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        return _AreaWeightedMse.backward(ctx, grad)

    @staticmethod
    @tangent_rule
    def jvp(
        ctx: Any, saved: list[Any], reconstruction: torch.Tensor, features: torch.Tensor, *_: None
    ) -> tuple[torch.Tensor, None, None]:
        with without_autocast(reconstruction.device):
            tangent = reference.area_weighted_mse_jvp(reconstruction, features, *saved)
        return tangent, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return fold_images(_AreaWeightedMseTransformed.apply, info, in_dims, *arguments)


def area_weighted_mse(
    reconstruction: torch.Tensor,
    features: torch.Tensor,
    slot_attention: torch.Tensor,
    exclude_empty: bool,
    power: float,
    cap: float,
) -> torch.Tensor:
    """Loss of each image; see :func:`ocvtp_kernels.reconstruction.area_weighted_mse`."""
    options = slot_attention.detach(), exclude_empty, power, cap
    if transformed(reconstruction, features, slot_attention):
        loss: torch.Tensor = _AreaWeightedMseTransformed.apply(reconstruction, features, *options)[0]
        return loss
    if torch.is_grad_enabled() and (reconstruction.requires_grad or features.requires_grad):
        if reconstruction is features:  # Dynamo can't pass one tensor twice to an autograd.Function
            features = features.view_as(features)
        return _AreaWeightedMse.apply(reconstruction, features, *options)
    return _area_weighted_mse(reconstruction, features, *options)[0]
