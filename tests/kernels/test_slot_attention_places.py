"""The top tokens in two steps, into memory that is there: bit by bit those of one call."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ocvtp_kernels import BackendUnavailableError
from ocvtp_kernels._arch import pretend
from ocvtp_kernels._launch import recording
from ocvtp_kernels.slot_attention import Places, TopTokens, normalise_tokens, top_tokens, top_tokens_into
from ocvtp_kernels.slot_attention import triton as kernels
from tests.kernels.test_slot_attention_triton import TINY, coarse, half_of, official, problem
from tests.kernels.triton_device import DEVICE, bits, surrounded

__all__ = ["coarse"]
BACKENDS = [("triton", torch.float32), ("triton", torch.float16), ("torch", torch.float32)]


def places_for(features: torch.Tensor, slots: int, dtype: torch.dtype) -> Places:
    places = Places.empty(features.shape[0], features.shape[1], slots, features.device, dtype)
    places.packed.fill_(-0x0101010101010102)
    return places


def assert_same(got: TopTokens, want: TopTokens, backend: str) -> None:
    keys = got.keys
    if backend == "torch":  # its one tile stands for all
        assert all(torch.equal(keys[:, :1], tile[:, None]) for tile in keys.unbind(1))
        keys = keys[:, :1]
    assert torch.equal(keys, want.keys)
    assert torch.equal(bits(got.largest), bits(want.largest))
    assert torch.equal(got.finite, want.finite)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(("images", "tokens", "slots"), [(1, 20, 5), (3, 77, 3)])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_same_bits_as_in_one_call(
    backend: str, dtype: torch.dtype, images: int, tokens: int, slots: int
) -> None:
    features, start, weights = problem(images, slots, tokens, TINY).arguments(dtype)
    want = top_tokens(features, start, weights, num_iters=2, backend=backend)
    places = places_for(features, slots, dtype)
    for layout in (features, surrounded(features)):
        if backend == "torch" and layout is not features:
            continue  # PyTorch's own sums may depend on strides
        normalised = normalise_tokens(layout, dtype, backend=backend)
        assert normalised.dtype == dtype
        got = top_tokens_into(places, normalised, start, weights, num_iters=2, backend=backend)
        assert_same(got, want, backend)
        assert_same(places.top, want, backend)


def test_features_go_to_the_place_they_are_given() -> None:
    features = problem(2, 5, 20, TINY).features.half()
    out = torch.full(features.shape, torch.nan, dtype=torch.float16, device=DEVICE)
    assert normalise_tokens(features, torch.float16, out=out, backend="triton") is out
    assert torch.equal(out, normalise_tokens(features, torch.float16, backend="triton"))
    want = normalise_tokens(features, torch.float16, backend="torch")
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)


def test_copies_are_one_piece_of_their_own() -> None:
    features, start, weights = problem(2, 5, 20, TINY).arguments(torch.float32)
    places = places_for(features, 5, torch.float32)
    normalised = normalise_tokens(features, torch.float32)
    want = top_tokens_into(places, normalised, start, weights)
    copied = places.clone()
    storage = copied.packed.untyped_storage().data_ptr()
    for mine, place in zip(copied.top, want, strict=True):
        assert torch.equal(mine, place)
        assert mine.untyped_storage().data_ptr() == storage != place.untyped_storage().data_ptr()
        assert mine.data_ptr() % 16 == storage % 16  # loads as wide as from memory of its own
    places.packed.zero_()
    assert copied.top.finite.all()


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_places_do_not_overlap(images: int, tokens: int, slots: int) -> None:
    places = places_for(torch.empty(images, tokens, 1), slots, torch.float32)
    top = places.top
    top.keys.fill_(1)
    top.largest.fill_(2.0)
    top.finite.fill_(True)
    assert (top.keys == 1).all()
    assert (top.largest == 2.0).all()
    assert top.finite.all()


def test_what_is_launched_of_one_image() -> None:
    """A graph holds all but the first launch."""
    start, weights = half_of(*official(1).folded(torch.float32))
    features = torch.empty(1, 577, 1024, dtype=torch.float16, device="meta")[:, 1:]
    normalised = torch.empty(1, 576, 1024, dtype=torch.float16, device="meta")
    with pretend("sm90"):
        places = Places.empty(1, 576, 64, features.device, torch.float16)
        with recording() as before:
            kernels.normalise_into(features, normalised)
        with recording() as recorded:
            kernels.assign(
                normalised, start, weights, 3, 1e-5, False, False, normalised=True, into=places.top
            )
    assert [launch.kernel.fn.__name__ for launch in before] == ["normalise"]
    names = [launch.kernel.fn.__name__ for launch in recorded]
    assert names == ["linear", "linear", "normalise", "slot_loop"]


def test_what_is_refused() -> None:
    features, start, weights = problem(2, 5, 20, TINY).arguments(torch.float32)
    places = places_for(features, 5, torch.float32)
    with pytest.raises(ValueError, match=r"\[B, N, C\]"):
        normalise_tokens(features[0], torch.float32)
    with pytest.raises(ValueError, match="of features"):
        normalise_tokens(features, torch.float32, out=torch.empty(2, 20, 3, device=DEVICE))
    for out in (torch.empty_like(features).half(), features.mT.contiguous().mT):
        with pytest.raises(ValueError, match=r"contiguous, torch\.float32"):
            normalise_tokens(features, torch.float32, out=out)
    with pytest.raises(BackendUnavailableError, match="float64"):
        normalise_tokens(features.double(), torch.float32, backend="triton")
    for wrong in (features.half(), features.mT.contiguous().mT):
        with pytest.raises(ValueError, match=r"contiguous and torch\.float32"):
            top_tokens_into(places, wrong, start, weights)
