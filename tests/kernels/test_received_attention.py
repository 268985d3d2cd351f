"""Received attention against the materialised map in float64."""

from __future__ import annotations

import pytest
import torch

from ocvtp_kernels.received_attention import received_attention
from tests.conftest import relative_error


def materialised(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(q.double() @ k.double().mT * scale, dim=-1).mean(dim=(1, 2))


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width"), [(1, 16, 577, 64), (3, 2, 50, 72), (2, 1, 1, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_equals_the_map(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    q, k = (torch.randn(batch, heads, tokens, width).to(dtype) for _ in range(2))
    received = received_attention(q, k)
    assert received.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Half inputs are exact in float32, so the error does not depend on the input dtype.
    assert relative_error(received, materialised(q, k)) <= (1e-14 if dtype == torch.float64 else 1e-6)
    assert torch.allclose(received.sum(dim=1), torch.ones(batch, dtype=received.dtype), atol=1e-5)


def test_fewer_queries_than_keys_and_a_scale() -> None:
    q, k = torch.randn(2, 3, 20, 16), torch.randn(2, 3, 33, 16)
    assert relative_error(received_attention(q, k, 0.7), materialised(q, k, 0.7)) <= 1e-6


def test_strided_inputs_and_batches() -> None:
    qkv = torch.randn(3, 40, 3, 4, 16)  # as a fused projection leaves them
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    together = received_attention(q, k)
    assert torch.equal(together, received_attention(q.contiguous(), k.contiguous()))
    for image in range(3):
        assert torch.equal(received_attention(q[image : image + 1], k[image : image + 1])[0], together[image])


def test_half_precision_scores_stay_distinct() -> None:
    """Averaging a bfloat16 map would collapse 576 scores to about a hundred values."""
    q, k = (torch.randn(1, 16, 577, 64).bfloat16() for _ in range(2))
    want = received_attention(q, k)
    assert want.unique().numel() > 560
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(received_attention(q, k), want)


def test_devices_must_agree() -> None:
    q, elsewhere = torch.rand(1, 2, 3, 4), torch.empty(1, 2, 3, 4, device="meta")
    with pytest.raises(ValueError, match="k is on meta, q on cpu"):
        received_attention(q, elsewhere)
    with pytest.raises(ValueError, match="lse is on meta, q on cpu"):
        received_attention(q, q, lse=elsewhere[..., 0])


@pytest.mark.parametrize(
    ("q", "k", "error"),
    [
        (torch.rand(2, 3, 4), torch.rand(2, 3, 4), ValueError),
        (torch.rand(2, 3, 4, 8), torch.rand(2, 3, 4, 9), ValueError),
        (torch.rand(2, 3, 4, 8), torch.rand(1, 3, 4, 8), ValueError),
        (torch.ones(2, 3, 4, 8, dtype=torch.int32), torch.rand(2, 3, 4, 8), TypeError),
    ],
)
def test_bad_arguments(q: torch.Tensor, k: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        received_attention(q, k)
