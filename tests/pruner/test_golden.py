"""Our code against tensors of the official implementation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ocvtp import OCPruner, area_weighted_mse
from ocvtp.pruner.checkpoint import to_official_name
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.selection import select_tokens
from ocvtp_kernels.slot_attention import reference, slot_attention
from tests.conftest import Golden, relative_error

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@pytest.fixture
def official(golden: Golden) -> OCPruner:
    return OCPruner.from_official(golden.state, decoder_heads=golden.config["transformer_nhead"])


def test_encoder(official: OCPruner, golden: Golden) -> None:
    encoded = reference.encode(golden.tensors["x"], official.weights())
    assert relative_error(encoded, golden.tensors["encoded"]) <= TOLERANCE


def test_initial_slots(official: OCPruner, golden: Golden) -> None:
    slots = official.initial_slots(golden.tensors["noise"])
    assert relative_error(slots, golden.tensors["slots_init"]) <= TOLERANCE


def test_slot_attention(official: OCPruner, golden: Golden) -> None:
    slots, attention = slot_attention(golden.tensors["x"], golden.tensors["slots_init"], official.weights())
    assert relative_error(slots, golden.tensors["slots"]) <= TOLERANCE
    assert relative_error(attention, golden.tensors["attn"]) <= TOLERANCE
    assert torch.equal(attention.argmax(dim=2), golden.tensors["top1"])


def test_inference_path_picks_the_official_tokens(official: OCPruner, golden: Golden) -> None:
    top = golden.tensors["top1"]
    keep = top.shape[1]
    selection = official(golden.tensors["x"], keep=keep, noise=golden.tensors["noise"], return_attention=True)
    assert relative_error(selection.slot_attention, golden.tensors["attn"]) <= TOLERANCE
    assert torch.equal(selection.slot_attention.argmax(dim=2), top)
    for row, picks, count in zip(selection.indices, top, selection.from_slots, strict=True):
        assert set(picks.tolist()) <= set(row.tolist())
        assert count == len(set(picks.tolist()))


def test_reconstruction_and_loss(official: OCPruner, golden: Golden) -> None:
    result = official.reconstruct(
        golden.tensors["x"], golden.tensors["noise"].shape[1], golden.tensors["noise"]
    )
    assert relative_error(result.slots, golden.tensors["slots"]) <= TOLERANCE
    assert relative_error(result.reconstruction, golden.tensors["recon"]) <= TOLERANCE
    loss = area_weighted_mse(
        result.reconstruction, golden.tensors["x"], result.slot_attention, empty_slots="official"
    )
    assert relative_error(loss, golden.tensors["loss"].squeeze()) <= TOLERANCE


def test_decoder_attention(official: OCPruner, golden: Golden) -> None:
    """The last layer's cross-attention, which the official decoder returns too, from our module's inputs."""
    seen: dict[str, torch.Tensor] = {}
    cross = official.decoder.layers[-1].multihead_attn
    cross.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(query=args[0], key=args[1]), with_kwargs=True
    )
    # The modules' fused path would bypass the hook; it is off while gradients are on.
    official.decoder(golden.tensors["x"], golden.tensors["slots"])
    _, weights = cross(seen["query"], seen["key"], seen["key"], need_weights=True)
    assert relative_error(weights.transpose(1, 2), golden.tensors["decoder_attn"]) <= TOLERANCE


def test_loss_alone_and_its_gradient(golden: Golden) -> None:
    recon = golden.tensors["recon"].clone().requires_grad_()
    per_image = area_weighted_mse(
        recon, golden.tensors["x"], golden.tensors["attn"], empty_slots="official", reduction="none"
    )
    assert relative_error(per_image, golden.tensors["loss_per_image"]) <= TOLERANCE
    per_image.mean().backward()
    assert relative_error(recon.grad, golden.tensors["grad_recon"]) <= GRADIENT_TOLERANCE


def test_gradients_of_every_parameter(official: OCPruner, golden: Golden) -> None:
    x = golden.tensors["x"]
    slots_init = golden.tensors["slots_init"].clone().requires_grad_()
    slots, attention = slot_attention(x, slots_init, official.weights())
    recon = official.decoder(x, slots)
    area_weighted_mse(recon, x, attention, empty_slots="official").backward()
    assert relative_error(slots_init.grad, golden.tensors["grad_slots_init"]) <= GRADIENT_TOLERANCE

    ours = {to_official_name(name): parameter.grad for name, parameter in official.named_parameters()}
    wanted = golden.gradients.keys() & golden.state.keys()
    # slots_init is the leaf here, not the mean and spread it is made of; and nothing is masked.
    assert golden.state.keys() - wanted == {"initializ.mean", "initializ.logstd", "decode.mask_token"}
    for name in wanted:
        want, got = golden.gradients[name], ours[name]
        if want.abs().max() < 1e-9:  # no gradient flows there, up to rounding
            assert got is None or got.abs().max() < 1e-7, name
        else:
            assert relative_error(got, want) <= GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("keep", [16, 20, 40])
def test_selection(golden_selection: dict[str, torch.Tensor], keep: int) -> None:
    fill = golden_selection["tower_attn"].mean(dim=(1, 2))[:, 1:]
    indices, from_slots = select_tokens(golden_selection["slot_attn"], keep, fill)
    assert torch.equal(indices, golden_selection[f"kept_{keep}"])
    assert torch.equal(from_slots, golden_selection[f"unique_{keep}"])


def test_received_attention_is_the_official_fill_score(golden_selection: dict[str, torch.Tensor]) -> None:
    """Queries and keys whose softmax is the golden map exactly: k = identity, q = log of the map."""
    attention = golden_selection["tower_attn"]
    tokens = attention.shape[-1]
    keys = torch.eye(tokens).expand(*attention.shape[:2], tokens, tokens)
    assert torch.allclose(F.softmax(attention.log(), dim=-1), attention, atol=1e-6)
    received = received_attention(attention.log(), keys, scale=1.0)
    assert relative_error(received, attention.mean(dim=(1, 2))) <= TOLERANCE
