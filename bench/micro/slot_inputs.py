"""Random checkpoints, slots and features for Slot Attention. Without pytest: the tuner uses them too."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ocvtp_kernels.slot_attention import (
    FoldedWeights,
    SlotAttentionWeights,
    SlotStart,
    fold,
    start_from_slots,
)

Folded = tuple[SlotStart, FoldedWeights]

_CLUSTERS = 9


class Widths(NamedTuple):
    """Of a checkpoint; the official one's, unless said."""

    features: int = 1024
    hidden: int = 2048
    slots: int = 512
    mlp: int = 2048


class Models(NamedTuple):
    """One checkpoint and its initial slots ``[1, K, D]``, in every form that an implementation takes."""

    slots: torch.Tensor  # float32, as the plain weights
    plain: SlotAttentionWeights
    folded: Folded
    mixed: Folded  # float16 matrices, float32 vectors: ours

    def half(self) -> Folded:
        """Everything in float16: what PyTorch's operators need to multiply in it."""
        start, weights = self.folded
        return SlotStart(*(t.half() for t in start)), FoldedWeights(*(t.half() for t in weights))


@functools.lru_cache(maxsize=1)
def random_weights(widths: Widths) -> SlotAttentionWeights:
    """A checkpoint whose norms and biases are not at their neutral start values; the same everywhere."""
    c, h, d, m = widths
    shapes: dict[str, tuple[int, ...]] = {
        "encoder_norm_weight": (c,),
        "encoder_norm_bias": (c,),
        "encoder_fc1_weight": (h, c),
        "encoder_fc1_bias": (h,),
        "encoder_fc2_weight": (d, h),
        "encoder_fc2_bias": (d,),
        "input_norm_weight": (d,),
        "input_norm_bias": (d,),
        "slot_norm_weight": (d,),
        "slot_norm_bias": (d,),
        "query_weight": (d, d),
        "key_weight": (d, d),
        "value_weight": (d, d),
        "gru_input_weight": (3 * d, d),
        "gru_hidden_weight": (3 * d, d),
        "gru_input_bias": (3 * d,),
        "gru_hidden_bias": (3 * d,),
        "mlp_norm_weight": (d,),
        "mlp_norm_bias": (d,),
        "mlp_fc1_weight": (m, d),
        "mlp_fc1_bias": (m,),
        "mlp_fc2_weight": (d, m),
        "mlp_fc2_bias": (d,),
    }
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            return 1.5 * values * shape[1] ** -0.5
        return 0.2 * values + name.endswith("norm_weight")

    return SlotAttentionWeights(**{name: draw(name, shape) for name, shape in shapes.items()})


def random_models(widths: Widths, slots: int, device: torch.device) -> Models:
    """The checkpoint with ``slots`` initial slots, in memory of its own."""
    generator = torch.Generator().manual_seed(1)
    initial = torch.randn(1, slots, widths.slots, generator=generator).to(device)
    plain = SlotAttentionWeights(*(t.to(device, copy=True) for t in random_weights(widths)))
    folded, mixed = fold(plain), fold(plain, torch.float16)
    return Models(
        initial, plain, (start_from_slots(initial, folded), folded), (start_from_slots(initial, mixed), mixed)
    )


def random_features(
    batch: int, tokens: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """``[B, N, C]`` in clusters, off centre, one channel 40 times as large as the others: as an encoder's."""
    device = generator.device

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    which = torch.randint(_CLUSTERS, (batch, tokens), generator=generator, device=device)
    features = randn(batch, tokens, width).mul_(0.6).add_(0.3) + 2 * randn(_CLUSTERS, width)[which]
    features[..., 7] *= 40
    return features.to(dtype)
