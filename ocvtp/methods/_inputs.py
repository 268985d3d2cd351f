"""What all selectors share."""

from __future__ import annotations

from dataclasses import replace

import torch

from ocvtp.checks import check_finite, not_finite
from ocvtp.selection import Selection
from ocvtp.watch import OnInvalid, check_on_invalid, on_host, watch_of_functions
from ocvtp_kernels._alike import image_by_image, laid_out
from ocvtp_kernels._checks import as_number, require_count, require_floating, require_shape
from ocvtp_kernels._device import without_autocast
from ocvtp_kernels.diversity import in_range
from ocvtp_kernels.selection import NotFinite, is_finite, marked


def check_features(features: torch.Tensor, keep: int) -> int:
    """``keep``; raises unless ``features`` are ``[B, N, C]`` floating point and ``1 <= keep <= N``."""
    require_floating("features", features)
    require_shape("features", features, (None, None, None), "[B, N, C]")
    return require_count("keep", keep, features.shape[1], "the number of tokens N")


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], meaning: str, beside: torch.Tensor
) -> None:
    """Raise unless ``tensor`` is floating point, finite, of ``shape`` and on the device of ``beside``."""
    require_floating(name, tensor)
    require_shape(name, tensor, shape, meaning)
    if tensor.device != beside.device:
        raise ValueError(
            f"{name} is on {tensor.device}, others on {beside.device}; move one with .to(device)"
        )
    if tensor.numel():
        check_finite(name, tensor)


def sound_images(name: str, tensor: torch.Tensor, on_invalid: OnInvalid) -> torch.Tensor | None:
    """``[B]`` bool: which images of ``tensor`` are finite; ``None`` if they all are, or it was asserted.

    Raises:
        ValueError: NaN or Inf on a CPU, unless ``on_invalid`` is ``"grid"``; an unknown ``on_invalid``.
    """
    if check_on_invalid(on_invalid) == "raise" and on_host(tensor):
        check_finite(name, tensor)
        return None
    return is_finite(tensor)


def settled(selection: Selection, sound: torch.Tensor | None, name: str, on_invalid: OnInvalid) -> Selection:
    """A selection by a tensor of which some images may not be :func:`sound_images`."""
    if sound is None:
        return selection
    assert selection.tokens is not None
    kind: NotFinite = "flag" if on_invalid == "raise" else "grid"
    indices, from_slots = marked(
        selection.indices, selection.from_slots, sound, selection.tokens, kind
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        watch_of_functions().note(sound, not_finite(name), on_invalid)
    return replace(selection, indices=indices, from_slots=from_slots)


def check_share(name: str, value: object, *, below_one: bool = False) -> float:
    """``value`` as a float if it is a number from 0 to 1, else ``TypeError`` or ``ValueError``."""
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not (0 <= number < 1 if below_one else 0 <= number <= 1):
        raise ValueError(f"{name} must be from 0 to 1{' (not 1)' if below_one else ''}; got {value!r}")
    return float(number)


def chosen(tokens: torch.Tensor, total: int) -> Selection:
    """A selection of ``tokens`` ``[B, keep]`` of ``total``, in any order; none of them is a slot's."""
    no_slots = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    return Selection(tokens.sort(dim=1).values, no_slots, tokens=total)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, count]`` int64: the highest of ``scores`` ``[B, N]``, best first, of equals the lowest index."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def others(tokens: torch.Tensor, total: int) -> torch.Tensor:
    """``[B, total - k]`` int64, ascending: the tokens that are not among ``tokens`` ``[B, k]``, unique."""
    taken = torch.zeros(len(tokens), total, dtype=torch.int8, device=tokens.device).scatter(1, tokens, 1)
    return taken.sort(dim=1, stable=True).indices[:, : total - tokens.shape[1]]


def owners(tokens: torch.Tensor, total: int, left: int = -1) -> torch.Tensor:
    """``[B, total]`` int64: the place of each token among ``tokens`` ``[B, k]``; ``left`` of all others."""
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    nobody = torch.full((len(tokens), total), left, dtype=torch.int64, device=tokens.device)
    return nobody.scatter(1, tokens, places)


def rows_of(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``[B, k, C]``: rows of ``x`` ``[B, N, C]`` at ``tokens`` ``[B, k]``."""
    return x.gather(1, tokens[:, :, None].expand(-1, -1, x.shape[2]))


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in at least float32, laid out by rows, without its history: what choices are made by."""
    return wide_rows(x.detach())


def wide_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` in at least float32, laid out by rows, with its history: what rows are sums of."""
    return laid_out(x, torch.promote_types(x.dtype, torch.float32))


def cosines(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """``[B, N, M]`` cosines of rows of ``x`` ``[B, N, C]`` with those of ``y`` ``[B, M, C]``, or of ``x``.

    In at least float32, and image by image: a product's bits would depend on how many are made together.
    Float64 has digits to spare, so its cosines are rounded to ``2**-30``: copies of a token are then equal
    however a library orders its sums.
    """
    if 0 in x.shape or (y is not None and 0 in y.shape):
        between = x.shape[1] if y is None else y.shape[1]
        return wide(x).new_zeros(*x.shape[:2], between)
    x = in_range(x.detach())
    y = x if y is None else in_range(y.detach())
    with without_autocast(x.device):
        (product,) = image_by_image(_cosines, x, y)
    return product


def _cosines(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
    product = torch.nn.functional.normalize(x, dim=2) @ torch.nn.functional.normalize(y, dim=2).mT
    return (product if product.dtype != torch.float64 else (product * 2.0**30).round() / 2.0**30,)
