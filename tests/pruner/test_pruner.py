"""OCPruner: budgets, determinism, caching, precision, devices and bad input."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocvtp import OCPruner, PrunerConfig, Selection
from ocvtp_kernels import BackendUnavailableError
from ocvtp_kernels.selection import select_tokens
from ocvtp_kernels.slot_attention import slot_attention
from tests.conftest import SMALL, make_pruner, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRUNER = make_pruner()
DECODING = replace(SMALL, decoder_layers=2, decoder_ffn_dim=64, decoder_tokens=50)


def features(batch: int = 2, tokens: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, SMALL.in_dim, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 4), st.integers(1, 70), st.data())
def test_any_shape_and_budget(batch: int, tokens: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    num_slots = data.draw(st.none() | st.integers(1, 80))
    x = features(batch, tokens)
    fill = data.draw(st.sampled_from([None, torch.rand(batch, tokens)]))
    selection = PRUNER(x, keep=keep, num_slots=num_slots, fill_scores=fill, return_attention=True)
    assert selection.indices.shape == (batch, keep)
    assert (selection.indices.diff(dim=1) > 0).all()
    assert selection.indices.min() >= 0
    assert selection.indices.max() < tokens
    slots = keep if num_slots is None else num_slots
    assert selection.slot_attention.shape == (batch, slots, tokens)
    assert (selection.from_slots >= 1).all()
    assert (selection.from_slots <= min(keep, slots)).all()
    again = select_tokens(selection.slot_attention, keep, fill)
    assert torch.equal(selection.indices, again[0])
    assert torch.equal(selection.gather(x), torch.stack([x[b, selection.indices[b]] for b in range(batch)]))


def test_equals_the_plain_reference_in_double() -> None:
    pruner = make_pruner().double()
    x, noise = features(3, 577).double(), torch.randn(3, 65, SMALL.slot_dim, dtype=torch.float64)
    selection = pruner(x, keep=65, noise=noise, return_attention=True)
    _, plain = slot_attention(x, pruner.initial_slots(noise), pruner.weights())
    assert selection.slot_attention.dtype == torch.float64
    assert relative_error(selection.slot_attention, plain) <= 1e-11
    assert torch.equal(selection.indices, select_tokens(plain, 65)[0])


def test_equals_the_plain_reference_in_single() -> None:
    x, noise = features(3, 576), torch.randn(1, 64, SMALL.slot_dim)
    selection = PRUNER(x, keep=64, noise=noise, return_attention=True)
    _, plain = slot_attention(x, PRUNER.initial_slots(noise), PRUNER.weights())
    assert relative_error(selection.slot_attention, plain) <= 1e-5
    assert torch.equal(selection.indices, select_tokens(plain, 64)[0])


@pytest.mark.parametrize(("num_iters", "eps"), [(1, 1e-5), (2, 1e-5), (3, 0.5), (4, 1e-5)])
def test_iterations_and_eps_are_the_configs(num_iters: int, eps: float) -> None:
    pruner = make_pruner(replace(DECODING, num_iters=num_iters, eps=eps)).double()
    x, noise = features(2).double(), torch.randn(1, 8, SMALL.slot_dim, dtype=torch.float64)
    slots, attention = slot_attention(
        x, pruner.initial_slots(noise), pruner.weights(), num_iters=num_iters, eps=eps
    )
    folded = pruner(x, keep=8, noise=noise, return_attention=True).slot_attention
    assert relative_error(folded, attention) <= 1e-11
    trained = pruner.reconstruct(x, num_slots=8, noise=noise)
    assert torch.equal(trained.slots, slots)
    assert torch.equal(trained.slot_attention, attention)


def test_same_bits_whatever_the_batch() -> None:
    x, fill = features(5, 100), torch.rand(5, 100)
    together = PRUNER(x, keep=20, fill_scores=fill, return_attention=True)
    for image in range(5):
        alone = PRUNER(
            x[image : image + 1], keep=20, fill_scores=fill[image : image + 1], return_attention=True
        )
        assert torch.equal(alone.indices[0], together.indices[image])
        assert torch.equal(alone.slot_attention[0], together.slot_attention[image])
    batched = PRUNER(x, keep=20, fill_scores=fill, return_attention=True, batch_invariant=False)
    assert relative_error(batched.slot_attention, together.slot_attention) <= 1e-5


def test_non_contiguous_features() -> None:
    x = features(2, 40)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    with_cls = torch.cat([torch.zeros(2, 1, SMALL.in_dim), x], dim=1)[:, 1:]
    want = PRUNER(x, keep=9).indices
    for view in (strided, with_cls):
        assert not view.is_contiguous()
        assert torch.equal(PRUNER(view, keep=9).indices, want)


def test_seeds() -> None:
    x = features(2, 60)

    def attention(**options: object) -> torch.Tensor:
        return PRUNER(x, keep=8, return_attention=True, **options).slot_attention

    assert torch.equal(attention(seed=3), attention(seed=3))
    assert not torch.allclose(attention(seed=3), attention(seed=4))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    attention(seed=11)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            again = copy.deepcopy(PRUNER)(x, keep=8, seed=3, return_attention=True).slot_attention
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(again, attention(seed=3))
    same_image = PRUNER(x[:1].expand(3, -1, -1), keep=8, seed=3)
    assert (same_image.indices == same_image.indices[0]).all()  # every image gets the same slots


def test_noise_per_image_and_shared() -> None:
    x, noise = features(3, 60), torch.randn(3, 8, SMALL.slot_dim)
    per_image = PRUNER(x, keep=8, noise=noise)
    for image in range(3):
        alone = PRUNER(x[image : image + 1], keep=8, noise=noise[image : image + 1])
        assert torch.equal(alone.indices[0], per_image.indices[image])
    with pytest.raises(ValueError, match="batch size 1 or 3"):
        PRUNER(x, keep=8, noise=noise[:2])


class TestFoldedWeightsFollowTheParameters:
    """Selections are computed from folded copies; every way to change a parameter must reach them."""

    @staticmethod
    def attention(pruner: OCPruner) -> torch.Tensor:
        return pruner(features(1), keep=8, return_attention=True).slot_attention

    def test_optimizer_step(self) -> None:
        pruner = make_pruner()
        before = self.attention(pruner)
        optimizer = torch.optim.AdamW(pruner.parameters(), lr=0.1)
        pruner.train()
        pruner(features(1), keep=8)  # an evaluation in the middle of training
        slots, _ = slot_attention(features(1), pruner.initial_slots(torch.randn(1, 4, 32)), pruner.weights())
        slots.square().mean().backward()
        optimizer.step()
        after = self.attention(pruner)
        assert not torch.allclose(before, after)
        assert torch.equal(after, self.attention(copy.deepcopy(pruner)))

    def test_fused_optimizer_in_training_mode(self) -> None:
        """Fused optimizers leave version counters alone, so training mode keeps nothing folded."""
        pruner = make_pruner().train()
        before = self.attention(pruner)
        for parameter in pruner.parameters():
            parameter.grad = torch.randn_like(parameter)
        torch.optim.AdamW(pruner.parameters(), lr=0.1, fused=True).step()
        after = self.attention(pruner)
        assert not torch.allclose(before, after)
        assert torch.equal(self.attention(pruner.eval()), after)

    def test_writes_that_leave_no_trace_need_refold(self) -> None:
        pruner = make_pruner()
        before = self.attention(pruner)
        pruner.slot_mean.data.add_(1.0)
        pruner.refold()
        assert not torch.allclose(before, self.attention(pruner))

    @pytest.mark.parametrize("change", ["train and eval", "double and float", "refold"])
    def test_compiled_code_follows(self, change: str) -> None:
        torch._dynamo.reset()
        pruner, x = make_pruner(), features(1)
        compiled = torch.compile(pruner, fullgraph=True, backend="aot_eager")
        pruner(x, keep=8)
        compiled(x, keep=8)
        with torch.no_grad():
            pruner.slot_mean.add_(torch.randn_like(pruner.slot_mean))
        if change == "train and eval":
            pruner.train().eval()
        elif change == "double and float":
            pruner.double().float()
        else:
            pruner.refold()
        got = compiled(x, keep=8, return_attention=True).slot_attention
        assert relative_error(got, self.attention(copy.deepcopy(pruner))) <= 1e-5

    def test_in_place_write(self) -> None:
        pruner = make_pruner()
        before = self.attention(pruner)
        with torch.no_grad():
            pruner.slot_mean.add_(1.0)
        assert not torch.allclose(before, self.attention(pruner))

    def test_load_state_dict(self) -> None:
        pruner, other = make_pruner(seed=0), make_pruner(seed=1)
        self.attention(pruner)
        pruner.load_state_dict(other.state_dict())
        assert torch.equal(self.attention(pruner), self.attention(other))

    def test_swapped_storage(self) -> None:
        pruner = make_pruner()
        before = self.attention(pruner)
        pruner.encoder.fc1.weight.data = torch.randn_like(pruner.encoder.fc1.weight)
        assert not torch.allclose(before, self.attention(pruner))

    def test_dtype(self) -> None:
        pruner = make_pruner()
        single = self.attention(pruner)
        assert self.attention(pruner.double()).dtype == torch.float64
        assert torch.equal(self.attention(pruner.float()), single)

    def test_deepcopy_is_independent(self) -> None:
        pruner = make_pruner()
        before = self.attention(pruner)
        twin = copy.deepcopy(pruner)
        with torch.no_grad():
            twin.slot_mean.add_(1.0)
        assert not torch.allclose(before, self.attention(twin))
        assert torch.equal(before, self.attention(pruner))

    def test_inference_tensors(self) -> None:
        with torch.inference_mode():
            pruner = make_pruner()
            inside = self.attention(pruner)
        assert torch.equal(inside, self.attention(make_pruner()))

    def test_nothing_extra_is_saved(self, tmp_path: Path) -> None:
        pruner = make_pruner()
        keys = set(pruner.state_dict())
        torch.save(pruner, tmp_path / "before.pt")
        self.attention(pruner)
        torch.save(pruner, tmp_path / "after.pt")
        assert set(pruner.state_dict()) == keys
        sizes = [(tmp_path / name).stat().st_size for name in ("before.pt", "after.pt")]
        assert abs(sizes[1] - sizes[0]) < 1000  # the folded copy would be fifty times that


def test_many_seeds_stay_bounded() -> None:
    pruner, x = make_pruner(), features(1)
    first = pruner(x, keep=8, seed=0).indices
    for seed in range(40):
        pruner(x, keep=8, seed=seed)
    assert len(pruner._folded_state._starts) <= 16
    assert torch.equal(pruner(x, keep=8, seed=0).indices, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_computed_in_single(dtype: torch.dtype) -> None:
    x = features().to(dtype)
    want = PRUNER(x.float(), keep=8, return_attention=True)
    got = PRUNER(x, keep=8, return_attention=True)
    assert got.slot_attention.dtype == torch.float32
    assert torch.equal(got.slot_attention, want.slot_attention)
    # Half weights are rounded once, in the checkpoint, and nowhere else.
    half = make_pruner().to(dtype)(x, keep=8, return_attention=True)
    upcast = make_pruner().to(dtype).float()(x, keep=8, return_attention=True)
    assert torch.equal(half.slot_attention, upcast.slot_attention)


def test_autocast_does_not_reach_the_pruner() -> None:
    x = features()
    want = PRUNER(x, keep=8, return_attention=True).slot_attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PRUNER(x, keep=8, return_attention=True).slot_attention, want)


def test_gather_is_differentiable_and_selection_is_not() -> None:
    x = features().requires_grad_()
    selection = PRUNER(x, keep=8, return_attention=True)
    assert not selection.slot_attention.requires_grad
    selection.gather(x).sum().backward()
    assert x.grad.sum() == 2 * 8 * SMALL.in_dim


@pytest.mark.parametrize("warm", [True, False])
def test_compiles_without_graph_breaks(warm: bool) -> None:
    torch._dynamo.reset()
    pruner, x = make_pruner(), features(2)
    want = make_pruner()(x, keep=8)
    if warm:
        pruner(x, keep=8)
    compiled = torch.compile(pruner, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = compiled(x, keep=8)
        assert isinstance(got, Selection)
        assert torch.equal(got.indices, want.indices)
    other = make_pruner(seed=1)
    pruner.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x, keep=8).indices, other(x, keep=8).indices)


def test_compiled_code_still_refuses_nan() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(make_pruner(), fullgraph=True, backend="aot_eager")
    bad = features()
    bad[0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        compiled(bad, keep=8)


def test_a_warm_compiled_graph_draws_no_noise() -> None:
    """Noise is drawn on the CPU; in a warm graph it would cost a copy to the device on every call."""
    torch._dynamo.reset()
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    pruner = make_pruner()
    compiled = torch.compile(pruner, fullgraph=True, backend=record)
    compiled(features(1), keep=8)
    assert "seeded_normal" in graphs[-1]
    torch._dynamo.reset()
    pruner(features(1), keep=8)
    compiled(features(1), keep=8)
    assert "seeded_normal" not in graphs[-1]


def test_python_never_waits_for_a_value() -> None:
    """A meta tensor has no values: whatever would read one back from a GPU raises here."""
    with torch.device("meta"):
        pruner = OCPruner(SMALL)
        x = torch.randn(4, 100, SMALL.in_dim, dtype=torch.float16)
        for batch_invariant in (True, False):
            selection = pruner(x, keep=16, fill_scores=torch.rand(4, 100), batch_invariant=batch_invariant)
            assert selection.indices.shape == (4, 16)
            assert selection.indices.device.type == "meta"
            assert selection.gather(x).shape == (4, 16, SMALL.in_dim)


def test_the_fallback_on_a_gpu_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from ocvtp_kernels import _backend

    _backend._said.clear()
    with torch.device("meta"), caplog.at_level(logging.WARNING, logger="ocvtp_kernels"):
        pruner = OCPruner(SMALL)
        for _ in range(3):
            pruner(torch.randn(1, 30, SMALL.in_dim), keep=4)
    assert [record.message.split(" runs ")[0] for record in caplog.records] == ["slot_attention", "selection"]
    assert "need a CUDA or ROCm GPU, not meta" in caplog.text


def test_triton_selects_the_same_tokens() -> None:
    x, received = features().to(DEVICE), torch.rand(2, 50).to(DEVICE)
    pruner = make_pruner().to(DEVICE)
    for fill in (received, None):
        got = pruner(x, keep=16, fill_scores=fill, backend="triton")
        want = pruner(x, keep=16, fill_scores=fill, backend="torch")
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.from_slots, want.from_slots)


def test_triton_that_cannot_run_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ocvtp_kernels._arch.has_triton", lambda: False)
    with pytest.raises(
        BackendUnavailableError, match="slot_attention can't run its Triton kernel: triton is not"
    ):
        PRUNER(features(), keep=8, backend="triton")
    assert PRUNER(features(), keep=8).indices.shape == (2, 8)


BAD_INPUT = [
    ({"features": features().tolist()}, TypeError, "torch.Tensor"),
    ({"features": torch.ones(1, 50, SMALL.in_dim, dtype=torch.int64)}, TypeError, "floating point"),
    ({"features": torch.rand(1, 50, SMALL.in_dim + 1)}, ValueError, f"any, any, {SMALL.in_dim}"),
    ({"features": torch.rand(50, SMALL.in_dim)}, ValueError, r"\[B, N, in_dim\]"),
    ({"features": torch.rand(0, 50, SMALL.in_dim)}, ValueError, "at least one image"),
    ({"features": torch.rand(1, 0, SMALL.in_dim)}, ValueError, "at least one"),
    ({"features": torch.full((1, 50, SMALL.in_dim), torch.nan)}, ValueError, "NaN or Inf"),
    ({"features": torch.full((1, 50, SMALL.in_dim), torch.inf)}, ValueError, "NaN or Inf"),
    ({"features": torch.full((1, 50, SMALL.in_dim), -torch.inf)}, ValueError, "NaN or Inf"),
    ({"keep": 0}, ValueError, "between 1 and 50"),
    ({"keep": 51}, ValueError, "between 1 and 50"),
    ({"keep": 1.5}, ValueError, "share of the tokens"),
    ({"keep": 0.0}, ValueError, "share of the tokens"),
    ({"keep": "8"}, ValueError, "number of tokens"),
    ({"keep": [8]}, TypeError, "keep must be an int"),
    ({"num_slots": 0}, ValueError, "num_slots"),
    ({"fill_scores": torch.rand(2, 49)}, ValueError, r"fill_scores must have shape \[B, N\]"),
    ({"fill_scores": torch.rand(50)}, ValueError, "fill_scores"),
    ({"fill_scores": torch.full((2, 50), torch.nan)}, ValueError, "fill_scores contains NaN"),
    ({"noise": torch.rand(1, 9, SMALL.slot_dim)}, ValueError, "noise must have shape"),
    ({"noise": torch.rand(1, 8, 5)}, ValueError, "noise must have shape"),
    ({"noise": torch.full((1, 8, SMALL.slot_dim), torch.nan)}, ValueError, "noise contains NaN"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": 2**63}, ValueError, "seed"),
    ({"seed": 1.5}, ValueError, "seed"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"precision": "bf16"}, ValueError, "precision must be"),
    ({"precision": "fp16"}, ValueError, "needs the Triton kernels"),
]


def test_explicit_single_precision_is_not_quietly_less() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="set_float32_matmul_precision"):
            PRUNER(features(), keep=8, precision="fp32")
        PRUNER(features(), keep=8)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert PRUNER(features(), keep=8, precision="fp32").indices.shape == (2, 8)


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"features": features(), "keep": 8, **change}
    with pytest.raises(error, match=message):
        PRUNER(**arguments)


def test_features_on_another_device() -> None:
    elsewhere = torch.empty(1, 100, SMALL.in_dim, device="meta")
    for call in (PRUNER, make_pruner(DECODING).reconstruct):
        with pytest.raises(ValueError, match=r"move one with \.to"):
            call(elsewhere)


def test_reconstruct_without_a_decoder() -> None:
    with pytest.raises(ValueError, match="decoder_layers=4"):
        PRUNER.reconstruct(features())


def test_reconstruct_with_a_mask() -> None:
    pruner = make_pruner(DECODING)
    x, mask = features(2, 50), torch.zeros(1, 50, dtype=torch.bool)
    mask[:, 10:] = True
    plain = pruner.reconstruct(x, num_slots=6)
    hidden = pruner.reconstruct(x, num_slots=6, mask=mask)
    assert plain.reconstruction.shape == x.shape
    assert not torch.allclose(plain.reconstruction, hidden.reconstruction)
    # Hidden tokens reach the output through the slots alone.
    moved = x.clone()
    moved[:, 10:] += torch.randn_like(moved[:, 10:])
    slots = hidden.slots
    assert torch.equal(pruner.decoder(x, slots, mask), pruner.decoder(moved, slots, mask))
    assert not torch.equal(pruner.decoder(x, slots), pruner.decoder(moved, slots))
    for wrong in (mask.float(), mask.tolist()):
        with pytest.raises(TypeError, match="mask must be bool"):
            pruner.reconstruct(x, mask=wrong)
    with pytest.raises(ValueError, match="mask must have batch size 1 or 2"):
        pruner.reconstruct(x, mask=mask.expand(3, -1))
    assert torch.equal(pruner.reconstruct(x.double(), num_slots=6).slots, plain.slots)
    with pytest.raises(ValueError, match="positions for 50 tokens"):
        pruner.reconstruct(features(2, 49))


def test_dropout_only_in_training() -> None:
    pruner, x = make_pruner(replace(DECODING, dropout=0.5)), features(1, 50)
    assert torch.equal(pruner.reconstruct(x, 6).slots, pruner.reconstruct(x, 6).slots)
    pruner.train()
    assert not torch.allclose(pruner.reconstruct(x, 6).slots, pruner.reconstruct(x, 6).slots)


@pytest.mark.parametrize(
    "change",
    [
        {"in_dim": 0},
        {"slot_dim": -1},
        {"num_iters": 0},
        {"layer": -1},
        {"hidden_dim": 1.5},
        {"eps": 0.0},
        {"dropout": 1.0},
        {"decoder_layers": 1, "decoder_heads": 3},
    ],
)
def test_impossible_configs(change: dict) -> None:
    with pytest.raises(ValueError, match="PrunerConfig"):
        PrunerConfig(**change)


def test_default_is_the_official_architecture() -> None:
    assert sum(p.numel() for p in OCPruner().parameters()) == 7_616_512


def test_one_graph_for_any_number_of_images_with_noise_of_their_own() -> None:
    pruner = make_pruner()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, noise: pruner(x, 3, noise=noise, batch_invariant=False).indices,
        dynamic=True,
        fullgraph=True,
        backend="eager",
    )
    for images in (2, 3):
        x, noise = torch.randn(images, 9, 48), torch.randn(images, 3, 32)
        assert torch.equal(compiled(x, noise), pruner(x, 3, noise=noise, batch_invariant=False).indices)
