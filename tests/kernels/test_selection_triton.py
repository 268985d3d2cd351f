"""The selection kernels, bit by bit against the rule in words, the PyTorch reference, and themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ocvtp.methods import grid
from ocvtp_kernels._arch import pretend
from ocvtp_kernels._tiles import table
from ocvtp_kernels.selection import gather_tokens, reference, select_from_keys, select_rows, select_tokens
from ocvtp_kernels.selection import op as operators
from ocvtp_kernels.selection import triton as kernels
from ocvtp_kernels.selection.shapes import MAX_TOKENS
from ocvtp_kernels.slot_attention import folded as slot_attention_folded
from tests.kernels.test_selection import keys_of, oracle
from tests.kernels.triton_device import (
    DEVICE,
    ON_GPU,
    PoisonedTorch,
    bits,
    far_apart,
    interpreter_only,
    randn,
    random_bits,
    rounded,
    surrounded,
)

HALF = (torch.float16, torch.bfloat16)
#: _SCAN_LIMIT under which every map is scanned by one program, or cut up into parts.
PATHS = {"scan": 2**31, "parts": 0}
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "slots last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "among poison": surrounded,
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program of an image selects anew, which the interpreter does one after the other."""
    if not ON_GPU:
        monkeypatch.setattr(kernels, "processors", lambda _: 1)


def assert_follows_the_rule(attention: torch.Tensor, keep: int, fill: torch.Tensor | None) -> None:
    indices, from_slots = select_tokens(attention, keep, fill, backend="triton")
    assert indices.dtype == from_slots.dtype == torch.int64
    kept, counts = oracle(attention, keep, fill)
    assert indices.tolist() == kept
    assert from_slots.tolist() == counts
    reference = select_tokens(attention, keep, fill, backend="torch")
    assert torch.equal(indices, reference[0])
    assert torch.equal(from_slots, reference[1])


def problem(
    batch: int, slots: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """A slot attention map and fill scores; in half precision both have ties."""
    attention = (2 * randn(batch, slots, tokens, seed=seed)).softmax(dim=1).to(dtype)
    return attention, randn(batch, tokens, seed=seed + 1, dtype=dtype)


# ---------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_every_variant(dtype: torch.dtype, layout: str) -> None:
    for batch, filled, keep in ((1, True, 7), (3, False, 7), (3, True, 49), (1, False, 1), (3, True, 20)):
        attention, fill = problem(batch, 7, 49, seed=keep, dtype=dtype)
        scores = LAYOUTS[layout](fill[:, None])[:, 0] if filled else None
        assert_follows_the_rule(LAYOUTS[layout](attention), keep, scores)


def _sizes() -> list[tuple[int, ...]]:
    sizes = itertools.product((1, 7, 16, 64, 65, 129, 192, 640), (49, 144, 576, 577))
    # 3, 2 and 4 kinds of a dtype, a fill and a layout meet in 12 sizes; twice that, with batches.
    return [(number, *size) for number, size in enumerate((*sizes, (16, 2880), (160, 2880)))]


@pytest.mark.parametrize(("number", "slots", "tokens"), _sizes())
def test_sizes(number: int, slots: int, tokens: int) -> None:
    dtype = (torch.float32, *HALF)[number % 3]
    layout = tuple(LAYOUTS.values())[number % 4]
    batch = 3 if number % 5 < 2 and slots < 640 else 1
    keep = (min(64, tokens), min(slots, tokens), max(1, slots // 2), tokens, 1)[number % 5]
    attention, fill = problem(batch, slots, tokens, number, dtype)
    assert_follows_the_rule(layout(attention), min(keep, tokens), fill if number // 3 % 2 else None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 255, 256, 257, 1024, 1025, MAX_TOKENS])
def test_token_counts_about_a_tile(tokens: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    attention, fill = problem(1, 3, tokens)
    assert_follows_the_rule(attention, (tokens + 1) // 2, fill)
    assert_follows_the_rule(attention, tokens, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("slots", [2, 3, 8, 15, 16, 17, 31, 33, 255, 256, 257, 513])
def test_slot_counts_about_a_tile(slots: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding slots pick nothing: not token 0, which histograms count them at, and no other."""
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    attention, fill = problem(1, slots, 40, slots)
    attention[..., 0] = -1.0  # no slot's top token
    assert_follows_the_rule(attention, 25, fill)
    attention[:, :-1] = 0.0
    attention[:, :-1, 30] = 1.0  # all but the last slot agree
    assert_follows_the_rule(attention, 2, fill)


LEVELS = {
    "signed zeros": [-0.0, 0.0],
    "infinite": [-torch.inf, -1.0, -0.0, 0.0, torch.inf],
    "all equal": [0.25],
    "all minus infinity": [-torch.inf],
    "few": [0.1, 0.2, 0.3],
    "subnormal": [-1e-45, -0.0, 0.0, 1e-45, 1e-40],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("levels", LEVELS)
def test_ties(levels: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tile of 128 tokens, across tiles, in the map and in the fill scores: the lower index wins."""
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    values = torch.tensor(LEVELS[levels])
    for seed, (keep, filled) in enumerate(itertools.product((1, 9, 150, 299), (True, False))):
        generator = torch.Generator().manual_seed(seed)
        attention = values[torch.randint(len(values), (1, 9, 299), generator=generator)].to(DEVICE)
        fill = values[torch.randint(len(values), (1, 299), generator=generator)].to(DEVICE)
        attention[:, :3, :140] = values.min()  # these slots' top token lies in the second tile or later
        assert_follows_the_rule(attention, keep, fill if filled else None)


@pytest.mark.parametrize("path", PATHS)
def test_extreme_budgets(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    _, fill = problem(2, 1, 40)
    same = torch.zeros(2, 33, 40, device=DEVICE)
    same[:, :, 39] = 1.0  # every slot picks the last token
    distinct = torch.eye(33, 40, device=DEVICE).expand(2, 33, 40)  # slot k picks token k, batch stride 0
    for attention in (same, distinct):
        for keep in (1, 10, 32, 33, 34, 40):
            assert_follows_the_rule(attention, keep, fill)
        assert_follows_the_rule(attention, 10, None)


@pytest.mark.parametrize("path", PATHS)
def test_nan_breaks_the_contract_but_not_the_memory(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    attention, fill = problem(3, 5, 200)
    attention[0, :, ::2] = attention[1, 2, 1:128] = fill[0, :50] = fill[1] = torch.nan
    if ON_GPU:  # the interpreter's argmax raises where all is NaN
        attention[1, 2] = attention[2] = torch.nan
    fill[0, 50:99] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN with every bit set
    x = randn(3, 200, 4, seed=0)
    for scores in (fill, None):
        indices, _, rows = select_rows(attention, 20, scores, x, backend="triton")
        assert (indices.diff(dim=1) > 0).all()
        assert (indices[:, 0] >= 0).all()
        assert (indices[:, -1] < 200).all()
        assert torch.equal(rows, gather_tokens(x, indices, backend="torch"))


# ---------------------------------------------------------------------------------- one result, many ways


@pytest.mark.parametrize(
    ("slots", "tokens", "dtype"),
    [(16, 144, torch.bfloat16), (65, 577, torch.float32), (300, 130, torch.float32)],
    ids=str,
)
def test_paths_agree(slots: int, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, fill = problem(1, slots, tokens, dtype=dtype)
    for scores, keep in ((fill, 64), (None, 64), (None, 9)):
        results = []
        launched = []
        monkeypatch.setattr(
            kernels,
            "launch",
            lambda kernel, *rest, run=kernels.launch, **tile: (
                launched.append(kernel.fn.__name__),  # noqa: B023 (called in this turn of the loop)
                run(kernel, *rest, **tile),
            ),
        )
        for limit in PATHS.values():
            monkeypatch.setattr(kernels, "_SCAN_LIMIT", limit)
            results.append(select_tokens(attention, keep, scores, backend="triton"))
        monkeypatch.undo()
        assert launched == ["select", "top_parts", "select"]
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("processors", [1, 3, 6, 1000])
def test_programs_agree(processors: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of programs that share an image's rows, and more images than processors."""
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    monkeypatch.setattr(kernels, "processors", lambda _: processors)
    attention, fill = problem(2, 8, 144)
    x = randn(2, 144, 9, seed=3)
    indices, from_slots, rows = select_rows(attention, 37, fill, x, backend="triton")
    want, count = select_tokens(attention, 37, fill, backend="torch")
    assert torch.equal(indices, want)
    assert torch.equal(from_slots, count)
    assert torch.equal(rows, gather_tokens(x, want, backend="torch"))


@pytest.mark.parametrize("path", PATHS)
def test_batch_and_run_do_not_matter(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    if not ON_GPU:
        # Three programs for an image alone, one in the batch.
        monkeypatch.setattr(kernels, "processors", lambda _: 3)
    attention, fill = problem(3, 20, 150, dtype=torch.float16)
    x = randn(3, 150, 5, seed=2)

    def selected(images: list[int]) -> tuple[torch.Tensor, ...]:
        scores = fill[images] if path == "scan" else None
        return select_rows(attention[images], 40, scores, x[images], backend="triton")

    together = selected([0, 1, 2])
    for images in ([0, 1, 2], [2, 1, 0], [0], [1], [2]):
        assert all(torch.equal(a, b[images]) for a, b in zip(selected(images), together, strict=True))


def _architectures() -> list[str]:
    """One of those whose tiles are the same; warps and stages mean nothing to the interpreter."""
    distinct: dict[str, str] = {}
    for arch in sorted({arch for _, arch, _ in table()}):
        rows = sorted((k, s, sorted(t.items())) for (k, a, s), t in table().items() if a == arch)
        tiles = [
            (kernel, shape, name, value)
            for kernel, shape, tile in rows
            for name, value in tile
            if kernel.startswith("selection.") and not name.startswith("num_")
        ]
        assert tiles
        distinct.setdefault(str(tiles), arch)
    return list(distinct.values())


@interpreter_only
@pytest.mark.parametrize("arch", _architectures())
def test_tiles_of_all_architectures_agree(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for (slots, tokens), path in itertools.product(((33, 200), (17, 257), (3, 1100)), PATHS.values()):
        monkeypatch.setattr(kernels, "_SCAN_LIMIT", path)
        attention, _ = problem(1, slots, tokens)
        x = randn(1, tokens, 3, seed=5, dtype=torch.float16)
        with pretend(arch):
            indices, from_slots, rows = select_rows(attention, 50, None, x, backend="triton")
            gradient = operators._scatter_tokens(rows, indices, 200) if tokens == 200 else None
        want, count = select_tokens(attention, 50, None, backend="torch")
        assert torch.equal(indices, want)
        assert torch.equal(from_slots, count)
        assert torch.equal(rows, gather_tokens(x, want, backend="torch"))
        if gradient is not None:
            assert torch.equal(gradient, scattered(rows, indices, tokens))


# ---------------------------------------------------------------------------------------------------- keys


def assert_keys_follow_the_rule(
    attention: torch.Tensor, keep: int, scores: torch.Tensor, parts: int, x: torch.Tensor | None = None
) -> None:
    keys = keys_of(attention, parts)
    kept, counts = oracle(attention, keep, scores)
    for backend in ("triton", "torch"):
        indices, from_slots, rows = select_from_keys(keys, keep, scores, x, backend=backend)
        assert indices.dtype == from_slots.dtype == torch.int64
        assert indices.tolist() == kept
        assert from_slots.tolist() == counts
        if x is None:
            assert rows is None
        else:
            assert rows is not None
            assert torch.equal(rows, torch.stack([x[b, indices[b]] for b in range(len(x))]))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 7, 8, 9, 17])
def test_keys_of_any_number_of_parts(parts: int, dtype: torch.dtype) -> None:
    """As many as are loaded at a time, one more and one less; in half precision with ties across them."""
    batch, slots, tokens, keep = {8: (2, 16, 257, 16), 9: (1, 3, 60, 7)}.get(parts, (2, 20, 60, 33))
    attention, fill = problem(batch, slots, tokens, parts, dtype)
    x = randn(batch, tokens, 5, seed=parts, dtype=dtype)
    assert_keys_follow_the_rule(attention, keep, fill, parts, x)
    largest = attention.amax(dim=1)
    want = select_rows(attention, keep, None, x, backend="triton")
    got = select_from_keys(keys_of(attention, parts), keep, largest, x, backend="triton")
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("slots", [1, 2, 31, 33, 255, 256, 257, 513])
def test_keys_of_slot_counts_about_a_tile(slots: int) -> None:
    attention, fill = problem(2, slots, 40, slots)
    attention[..., 0] = -1.0  # no slot's top token, where padding is counted
    assert_keys_follow_the_rule(attention, 25, fill, 3)
    attention[:, :-1] = 0.0
    attention[:, :-1, 30] = 1.0  # all but the last slot agree
    assert_keys_follow_the_rule(attention, 2, fill, 3)


@pytest.mark.parametrize("levels", LEVELS)
def test_ties_of_keys(levels: str) -> None:
    values = torch.tensor(LEVELS[levels])
    for seed, (keep, parts) in enumerate(itertools.product((1, 9, 120), (1, 5))):
        generator = torch.Generator().manual_seed(seed)
        attention = values[torch.randint(len(values), (1, 9, 130), generator=generator)].to(DEVICE)
        scores = values[torch.randint(len(values), (1, 130), generator=generator)].to(DEVICE)
        assert_keys_follow_the_rule(attention, keep, scores, parts)


@pytest.mark.parametrize("tokens", [1, 2, 255, 256, 257, 1025, MAX_TOKENS])
def test_keys_of_token_counts_about_a_size(tokens: int) -> None:
    attention, fill = problem(1, 3, tokens)
    assert_keys_follow_the_rule(attention, (tokens + 1) // 2, fill, 9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_scores_and_rows_of_any_layout(layout: str) -> None:
    change = LAYOUTS[layout]
    attention, fill = problem(3, 6, 49)
    x = randn(3, 49, 5, seed=2)
    keys = keys_of(attention, 4)
    want = select_from_keys(keys, 11, fill, x, backend="torch")
    got = select_from_keys(change(keys), 11, change(fill[:, None])[:, 0], change(x), backend="triton")
    assert all(map(torch.equal, got, want))


def test_gradient_of_rows_from_keys() -> None:
    attention, fill = problem(2, 4, 30)
    fill.requires_grad_()
    keys = keys_of(attention, 3)
    x = randn(2, 30, 6, seed=0).requires_grad_()
    weights = randn(2, 11, 6, seed=1)
    indices, from_slots, rows = select_from_keys(keys, 11, fill, x, backend="triton")
    assert rows is not None
    assert not indices.requires_grad
    assert not from_slots.requires_grad
    gradients = torch.autograd.grad((rows * weights).sum(), (x, fill), allow_unused=True)
    assert torch.equal(gradients[0], scattered(weights, indices, 30))
    assert gradients[1] is None
    double = x.detach().double().requires_grad_()

    def rows_of(t: torch.Tensor) -> torch.Tensor:
        rows = select_from_keys(keys, 3, fill, t, backend="triton")[2]
        assert rows is not None
        return rows

    assert torch.autograd.gradcheck(rows_of, double, fast_mode=True)
    assert torch.autograd.gradgradcheck(rows_of, double, fast_mode=True)
    assert not rows_of(x.detach()).requires_grad
    with torch.no_grad():
        assert not rows_of(x).requires_grad


def test_no_images_from_keys() -> None:
    keys, scores, x = keys_of(problem(2, 3, 9)[0], 2)[:0], randn(0, 9, seed=0), randn(0, 9, 5, seed=0)
    for backend in ("torch", "triton"):
        indices, from_slots, rows = select_from_keys(keys, 4, scores, x, backend=backend)
        assert rows is not None
        assert (indices.shape, from_slots.shape, rows.shape) == ((0, 4), (0,), (0, 4, 5))


def test_bad_keys_break_the_contract_but_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that name no token, and NaN scores."""
    keys = random_bits(3, 4, 9, seed=0, dtype=torch.int64)
    keys[0, 0] = torch.iinfo(torch.int64).min
    keys[1, 2] = torch.iinfo(torch.int64).max
    _, scores = problem(3, 1, 200)
    scores[1, ::3] = torch.nan
    x = randn(3, 200, 4, seed=0)
    torch_with_guards = PoisonedTorch()
    monkeypatch.setattr(kernels, "torch", torch_with_guards)
    indices, from_slots, rows = select_from_keys(keys, 20, scores, x, backend="triton")
    torch_with_guards.assert_guards_intact()
    assert len(torch_with_guards.buffers) == 3
    assert (indices.diff(dim=1) > 0).all()
    assert (indices[:, 0] >= 0).all()
    assert (indices[:, -1] < 200).all()
    assert ((from_slots >= 0) & (from_slots <= 9)).all()
    assert rows is not None
    assert torch.equal(rows, gather_tokens(x, indices, backend="torch"))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_keys_and_scores_beyond_32_bit_offsets(axis: int) -> None:
    attention, fill = problem(5, 5, 5, dtype=torch.float16)
    keys = keys_of(attention, 5)
    x = random_bits(5, 5, 5, seed=0, dtype=torch.uint8)
    want = select_from_keys(keys, 3, fill, x, backend="torch")
    scores = fill if axis == 2 else far_apart(fill, axis)
    got = select_from_keys(keys, 3, scores, far_apart(x, axis), backend="triton")
    assert all(map(torch.equal, got, want))


# ---------------------------------------------------------------------------------------------------- rows

ROW_DTYPES = (
    torch.uint8,
    torch.bool,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
)
ROW_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **LAYOUTS,
    "an odd offset": lambda t: t[:, :, 1:],
    "every other channel": lambda t: t[:, :, ::2],
    "tokens skipped": lambda t: t[:, 1::2],
    "one image": lambda t: t[:1].expand(3, -1, -1),
    "one token": lambda t: t[:, 5:6].expand(-1, 24, -1),
    "one channel": lambda t: t[:, :, 3:4].expand(-1, -1, 7),
}


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_rows_are_copied_bit_by_bit(dtype: torch.dtype, layout: str) -> None:
    x = ROW_LAYOUTS[layout](random_bits(3, 50, 33, seed=0, dtype=dtype))
    tokens = x.shape[1]
    indices = torch.randint(tokens, (3, 11), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    indices[0, :3] = tokens - 1  # repeated, and the last
    rows = gather_tokens(x, indices, backend="triton")
    assert rows.dtype == dtype
    assert torch.equal(bits(rows), bits(torch.stack([x[b, indices[b]] for b in range(3)])))
    if dtype == torch.float16 or layout == "contiguous":
        attention, fill = problem(3, 4, tokens)
        kept, _, rows = select_rows(attention, 9, fill, x, backend="triton")
        assert torch.equal(bits(rows), bits(torch.stack([x[b, kept[b]] for b in range(3)])))


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1024])
@pytest.mark.parametrize("keep", [1, 3, 4, 5])
def test_row_sizes_about_a_tile(width: int, keep: int) -> None:
    attention, fill = problem(2, 2, 20)
    x = randn(2, 20, width, seed=1, dtype=torch.bfloat16)
    indices, _, rows = select_rows(attention, keep, fill, x, backend="triton")
    want = gather_tokens(x, indices, backend="torch")
    assert torch.equal(rows, want)
    assert torch.equal(gather_tokens(x, indices, backend="triton"), want)


def test_lazily_conjugated_and_negated_rows() -> None:
    """Views whose values are not their storage's."""
    x = torch.complex(randn(2, 9, 3, seed=0), randn(2, 9, 3, seed=1)).conj()
    attention, _ = problem(2, 3, 9)
    assert x.is_conj()
    assert x.imag.is_neg()
    for view in (x, x.imag):
        indices, _, rows = select_rows(attention, 4, None, view, backend="triton")
        want = gather_tokens(view, indices, backend="torch")
        assert torch.equal(rows, want)
        assert torch.equal(gather_tokens(view, indices, backend="triton"), want)
    negated = torch.complex(attention, attention).conj().imag
    assert negated.is_neg()
    assert_follows_the_rule(negated, 4, None)


def test_indices_of_any_layout() -> None:
    x = randn(3, 20, 4, seed=0)
    indices = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for view in (indices.T.contiguous().T, surrounded(indices), indices[:1].expand(3, -1), indices[:, ::2]):
        assert torch.equal(gather_tokens(x, view, backend="triton"), gather_tokens(x, view, backend="torch"))


def test_nothing_to_do() -> None:
    none = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    x = randn(2, 9, 5, seed=0).requires_grad_()
    rows = gather_tokens(x, none, backend="triton")
    assert rows.shape == (2, 0, 5)
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))
    attention, _ = problem(2, 3, 9)
    assert select_rows(attention, 4, None, x[..., :0], backend="triton")[2].shape == (2, 4, 0)
    assert gather_tokens(x[:0], none[:0], backend="triton").shape == (0, 0, 5)
    assert select_tokens(attention[:0], 4, None, backend="triton")[0].shape == (0, 4)


def test_no_images() -> None:
    attention, _ = problem(2, 3, 9)
    x = randn(0, 9, 5, seed=0)
    results = {}
    for backend in ("torch", "triton"):
        results[backend] = [t.shape for t in select_rows(attention[:0], 4, None, x, backend=backend)]
    assert results["triton"] == results["torch"]


# ----------------------------------------------------------------------------------------------- gradients


def scattered(rows: torch.Tensor, indices: torch.Tensor, tokens: int) -> torch.Tensor:
    """Rows added one at a time, in their order, in at least float32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    x = torch.zeros(rows.shape[0], tokens, rows.shape[2], dtype=dtype, device=rows.device)
    for image, image_indices in enumerate(indices.tolist()):
        for row, token in enumerate(image_indices):
            if 0 <= token < tokens:
                x[image, token] += rows[image, row].to(dtype)
    return rounded(x, rows.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_gradient_adds_rows_in_their_order(dtype: torch.dtype) -> None:
    """Exactly: unsorted indices among few tokens, in more than one chunk of rows and of channels."""
    tokens = 11
    x = randn(2, tokens, 130, seed=0, dtype=dtype).requires_grad_()
    indices = torch.randint(tokens, (2, 70), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    indices[1] = 3  # all of an image's rows from one token
    weights = randn(2, 70, 130, seed=2, dtype=dtype)
    (gradient,) = torch.autograd.grad((gather_tokens(x, indices, backend="triton") * weights).sum(), x)
    assert torch.equal(gradient, scattered(weights, indices, tokens))
    again = operators._scatter_tokens(weights, indices, tokens)
    assert torch.equal(gradient, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_gradient_equals_scatter_add(dtype: torch.dtype) -> None:
    """On integers, whose sums are exact in float32 and which only the last rounding touches."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-99, 99, (3, 40, 7), generator=generator).to(DEVICE, dtype)
    indices = torch.randint(9, (3, 40), generator=generator).to(DEVICE)
    x = torch.zeros(3, 12, 7, dtype=dtype, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad((gather_tokens(x, indices, backend="triton") * weights).sum(), x)
    exact = torch.zeros(3, 12, 7, dtype=torch.float64, device=DEVICE)
    exact.scatter_add_(1, indices[..., None].expand(-1, -1, 7), weights.double())
    assert torch.equal(gradient, rounded(exact, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_strided_rows(layout: str) -> None:
    rows = randn(2, 9, 12, seed=0)
    indices = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got = operators._scatter_tokens(LAYOUTS[layout](rows), LAYOUTS[layout](indices[:, None])[:, 0], 20)
    assert torch.equal(got, scattered(rows, indices, 20))


def test_gradient_of_select_rows() -> None:
    attention, fill = problem(2, 4, 30)
    attention.requires_grad_()
    fill.requires_grad_()
    x = randn(2, 30, 6, seed=0).requires_grad_()
    weights = randn(2, 11, 6, seed=1)
    indices, from_slots, rows = select_rows(attention, 11, fill, x, backend="triton")
    assert not indices.requires_grad
    assert not from_slots.requires_grad
    gradients = torch.autograd.grad((rows * weights).sum(), (x, attention, fill), allow_unused=True)
    assert torch.equal(gradients[0], scattered(weights, indices, 30))
    assert gradients[1:] == (None, None)
    # An expanded gradient, as .sum() gives it, and none at all.
    (ones,) = torch.autograd.grad(select_rows(attention, 11, fill, x, backend="triton")[2].sum(), x)
    assert torch.equal(ones, scattered(torch.ones_like(weights), indices, 30))
    assert not select_rows(attention, 11, fill, x.detach(), backend="triton")[2].requires_grad
    with torch.no_grad():
        assert not select_rows(attention, 11, fill, x, backend="triton")[2].requires_grad


def test_derivatives_of_any_order() -> None:
    x = randn(2, 5, 3, seed=0, dtype=torch.float64).requires_grad_()
    indices = torch.tensor([[4, 1, 1], [0, 3, 0]], device=DEVICE)
    attention, _ = problem(2, 2, 5)
    for function in (
        lambda t: gather_tokens(t, indices, backend="triton"),
        lambda t: select_rows(attention, 3, None, t, backend="triton")[2],
    ):
        assert torch.autograd.gradcheck(function, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_gradient_of_complex_rows() -> None:
    x = torch.complex(randn(2, 9, 3, seed=0), randn(2, 9, 3, seed=1)).requires_grad_()
    indices = torch.tensor([[4, 1, 1], [0, 3, 0]], device=DEVICE)
    weights = torch.complex(randn(2, 3, 3, seed=2), randn(2, 3, 3, seed=3))
    want, got = (
        torch.autograd.grad(gather_tokens(x, indices, backend=backend), x, weights)[0]
        for backend in ("torch", "triton")
    )
    assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------------- memory


def test_indices_out_of_range_read_and_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_with_guards = PoisonedTorch()
    monkeypatch.setattr(kernels, "torch", torch_with_guards)
    x = surrounded(randn(2, 9, 5, seed=0))
    wild = [-1, 9, 2**31, 2**32 + 1, -(2**32) + 1, 2**63 - 1, -(2**63)]
    indices = torch.tensor([[*wild, 0, 8], [8, 0, *wild]], device=DEVICE)
    rows = gather_tokens(x, indices, backend="triton")
    assert torch.equal(rows[0, :7], torch.zeros(7, 5, device=DEVICE))
    assert torch.equal(rows[1, 2:], torch.zeros(7, 5, device=DEVICE))
    assert torch.equal(rows[0, 7:], x[0, [0, 8]])
    assert torch.equal(rows[1, :2], x[1, [8, 0]])
    weights = randn(2, 9, 5, seed=1)
    assert torch.equal(operators._scatter_tokens(weights, indices, 9), scattered(weights, indices, 9))
    torch_with_guards.assert_guards_intact()


# ------------------------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize(
    ("path", "dtype", "not_finite"),
    [
        ("scan", torch.float32, "grid"),
        ("scan", torch.bfloat16, "flag"),
        ("parts", torch.float16, "grid"),
        ("parts", torch.float32, "flag"),
    ],
)
def test_images_that_are_not_finite_are_told(
    path: str, dtype: torch.dtype, not_finite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By -1 for the number of their picks; the others keep their bits, and both backends say the same."""
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    clean, fill = problem(5, 3, 49, dtype=dtype)
    attention, scores = clean.clone(), fill.clone()
    attention[0, 2, 48] = torch.nan
    attention[1, 0, 0] = -torch.inf
    scores[2, 48], scores[3, 7] = torch.inf, torch.nan
    for given, spoilt in ((None, (0, 1)), (scores, (0, 1, 2, 3))):
        want = select_tokens(clean, 20, None if given is None else fill, backend="torch")
        got = select_tokens(attention, 20, given, backend="triton", not_finite=not_finite)
        pytorch = select_tokens(attention, 20, given, backend="torch", not_finite=not_finite)
        bad = torch.tensor([image in spoilt for image in range(5)], device=DEVICE)
        assert torch.equal(got[1], torch.where(bad, -1, want[1]))
        assert torch.equal(pytorch[1], got[1])
        assert torch.equal(got[0][~bad], want[0][~bad])
        assert torch.equal(pytorch[0][~bad], want[0][~bad])
        if not_finite == "grid":
            even = reference.evenly(49, 20, DEVICE).expand(len(spoilt), -1)
            assert torch.equal(got[0][bad], even)
            assert torch.equal(pytorch[0][bad], even)


@pytest.mark.parametrize("from_keys", [False, True])
def test_rows_of_images_that_are_not_finite(from_keys: bool) -> None:
    """They are those of the tokens spread evenly, and get the gradient."""
    attention, fill = problem(2, 3, 49)
    keys, _, finite = slot_attention_folded.top_tokens(attention)
    attention[0, 1, 5] = torch.nan
    finite[0, 5] = False
    x = randn(2, 49, 5, seed=2).requires_grad_()
    if from_keys:
        found = select_from_keys(keys, 20, fill, x, finite=finite, not_finite="grid", backend="triton")
    else:
        found = select_rows(attention, 20, fill, x, not_finite="grid", backend="triton")
    indices, told, rows = found
    assert rows is not None
    assert told[0] == -1
    assert torch.equal(indices[0], reference.evenly(49, 20, DEVICE))
    assert torch.equal(rows, gather_tokens(x, indices, backend="torch"))
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert torch.equal(gradient[0].any(dim=1).nonzero()[:, 0], indices[0])


@pytest.mark.parametrize("not_finite", ["flag", "grid"])
def test_keys_of_images_that_are_not_finite(not_finite: Any) -> None:
    attention, fill = problem(6, 3, 49)
    clean = slot_attention_folded.top_tokens(attention)
    want = select_from_keys(clean[0], 20, fill, backend="triton")
    finite, scores = clean[2].clone(), fill.clone()
    finite[0, 48] = finite[1, 0] = False
    for image, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        scores[2 + image, 5 * image] = value
    keys = clean[0].clone()
    keys[0] = torch.iinfo(torch.int64).max  # as NaN may leave them
    options: dict[str, Any] = {"finite": surrounded(finite), "not_finite": not_finite}
    got = select_from_keys(keys, 20, scores, backend="triton", **options)
    pytorch = select_from_keys(clean[0], 20, scores, backend="torch", **options)
    assert got[1].tolist() == pytorch[1].tolist() == [-1] * 5 + [int(want[1][5])]
    assert torch.equal(got[0][5], want[0][5])
    if not_finite == "grid":
        assert torch.equal(got[0], pytorch[0])
        assert torch.equal(got[0][0], reference.evenly(49, 20, DEVICE))
    allowed = select_from_keys(clean[0], 20, fill, finite=finite, backend="triton")
    assert all(map(torch.equal, allowed[:2], want[:2]))


def test_evenly_spread_tokens() -> None:
    """By the rule of ocvtp.methods.grid, whose picture is a square or a row."""
    for tokens in (1, 2, 9, 50, 144, 255, 256, 576, 577, 2880):
        side = math.isqrt(tokens)
        shape = (side, side) if side * side == tokens else (1, tokens)
        for keep in {1, 2, 7, (tokens + 1) // 2, tokens} & set(range(1, tokens + 1)):
            want = grid(torch.empty(1, tokens, 1), keep, shape=shape).indices[0].tolist()
            assert want == sorted(set(want))
            assert reference.evenly(tokens, keep, DEVICE).tolist() == want


@pytest.mark.parametrize(("tokens", "keep"), [(1, 1), (144, 7), (577, 64), (2880, 160), (256, 256)])
def test_the_kernel_spreads_alike(tokens: int, keep: int) -> None:
    attention = torch.zeros(1, 2, tokens, device=DEVICE)
    attention[0, 1, -1] = torch.nan
    got, told = select_tokens(attention, keep, backend="triton", not_finite="grid")
    assert torch.equal(got[0], reference.evenly(tokens, keep, DEVICE))
    assert told.item() == -1


def test_what_not_finite_may_be() -> None:
    attention, fill = problem(2, 3, 16)
    keys, _, finite = slot_attention_folded.top_tokens(attention)
    with pytest.raises(ValueError, match=r'one of "allow", "flag", "grid"; got .raise'):
        select_tokens(attention, 3, not_finite="raise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs finite="):
        select_from_keys(keys, 3, fill, not_finite="flag")
    with pytest.raises(TypeError, match="finite must be bool"):
        select_from_keys(keys, 3, fill, finite=fill, not_finite="flag")
    with pytest.raises(ValueError, match="finite must have shape"):
        select_from_keys(keys, 3, fill, finite=finite[:, 1:], not_finite="flag")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("tokens", [130, 256])
def test_every_output_is_written_and_nothing_else(
    path: str, filled: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    attention, fill = problem(2, 9, tokens)
    attention = surrounded(attention)
    scores = surrounded(fill) if filled else None
    x = surrounded(randn(2, tokens, 17, seed=0, dtype=torch.float16)).requires_grad_()
    want = select_rows(attention, 21, scores, x, backend="torch")
    (want_gradient,) = torch.autograd.grad(want[2].sum(), x)
    torch_with_guards = PoisonedTorch()
    monkeypatch.setattr(kernels, "torch", torch_with_guards)
    got = select_rows(attention, 21, scores, x, backend="triton")
    assert all(map(torch.equal, got, want))
    (gradient,) = torch.autograd.grad(got[2].sum(), x)
    assert torch.equal(gradient, want_gradient)
    assert all(map(torch.equal, select_tokens(attention, 21, scores, backend="triton"), want))
    assert torch.equal(gather_tokens(x, want[0], backend="triton"), want[2])
    torch_with_guards.assert_guards_intact()
    # rows and gradient, twice indices and count, twice the parts and without fill scores what those are then.
    assert len(torch_with_guards.buffers) == 7 + (path == "parts") * (2 + 2 * (not filled))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("path", PATHS)
def test_maps_beyond_32_bit_offsets(axis: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SCAN_LIMIT", PATHS[path])
    attention, fill = problem(5, 5, 5, dtype=torch.float16)
    scores = fill if axis == 1 else far_apart(fill, axis // 2)
    assert_follows_the_rule(far_apart(attention, axis), 3, scores)
    assert_follows_the_rule(far_apart(attention, axis), 3, None)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_beyond_32_bit_offsets(axis: int) -> None:
    x = random_bits(5, 5, 5, seed=0, dtype=torch.uint8)
    far = far_apart(x, axis)
    indices = torch.tensor([[4, 0, 2, 3, 4]] * 5, device=DEVICE)
    assert torch.equal(gather_tokens(far, indices, backend="triton"), x[:, indices[0]])
    attention, fill = problem(5, 3, 5)
    kept, _, rows = select_rows(attention, 4, fill, far, backend="triton")
    assert torch.equal(rows, gather_tokens(x, kept, backend="torch"))
    weights = randn(5, 5, 5, seed=1, dtype=torch.float16)
    got = operators._scatter_tokens(far_apart(weights, axis), indices, 6)
    assert torch.equal(got, scattered(weights, indices, 6))
