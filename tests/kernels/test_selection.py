"""Token selection against a readable Python retelling of the rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocvtp_kernels import BackendUnavailableError
from ocvtp_kernels.selection import gather_tokens, select_from_keys, select_rows, select_tokens


def oracle(
    attention: torch.Tensor, keep: int, fill: torch.Tensor | None
) -> tuple[list[list[int]], list[int]]:
    """The rule in words: rank by (is a slot's top token, score descending, index ascending)."""
    kept, counts = [], []
    for image, row in enumerate(attention.tolist()):
        tokens = range(len(row[0]))
        picked = {max(tokens, key=lambda n, slot=slot: (slot[n], -n)) for slot in row}
        scores = fill[image].tolist() if fill is not None else [max(slot[n] for slot in row) for n in tokens]
        ranked = sorted(tokens, key=lambda n: (n not in picked, -scores[n], n))
        kept.append(sorted(ranked[:keep]))
        counts.append(min(len(picked), keep))
    return kept, counts


def keys_of(attention: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """The top tokens of a map ``[B, K, N]`` as keys ``[B, T, K]``, its tokens cut into T parts or fewer."""
    keys, first = [], 0
    for part in attention.tensor_split(min(parts, attention.shape[2]), dim=2):
        best, top = part.float().max(dim=2)  # ties: the lowest token
        score = (best + 0.0).view(torch.int32).long()  # -0.0 is 0.0
        score = torch.where(score < 0, score ^ 0x7FFFFFFF, score)
        keys.append(score << 32 | 0x7FFFFFFF - (top + first))
        first += part.shape[2]
    return torch.stack(keys, dim=1)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, int, torch.Tensor | None]:
    batch, slots, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 40))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))  # few levels: many ties; one: everything ties
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    attention = torch.randint(levels, (batch, slots, tokens), generator=generator).float() / levels
    fill = torch.randint(levels, (batch, tokens), generator=generator).float() - 1
    return attention, draw(st.integers(1, tokens)), draw(st.sampled_from([None, fill]))


@given(problems())
def test_equals_the_rule(problem: tuple[torch.Tensor, int, torch.Tensor | None]) -> None:
    attention, keep, fill = problem
    indices, from_slots = select_tokens(attention, keep, fill)
    kept, counts = oracle(attention, keep, fill)
    assert indices.tolist() == kept
    assert from_slots.tolist() == counts
    assert indices.dtype == from_slots.dtype == torch.int64


@given(problems(), st.integers(1, 9))
def test_keys_equal_the_rule(problem: tuple[torch.Tensor, int, torch.Tensor | None], parts: int) -> None:
    """Whatever the parts: ties within one and across them go to the lowest token."""
    attention, keep, fill = problem
    scores = attention.amax(dim=1) if fill is None else fill
    indices, from_slots, rows = select_from_keys(keys_of(attention, parts), keep, scores)
    kept, counts = oracle(attention, keep, fill)
    assert indices.tolist() == kept
    assert from_slots.tolist() == counts
    assert indices.dtype == from_slots.dtype == torch.int64
    assert rows is None


@pytest.mark.parametrize(
    ("slots", "tokens", "keep"), [(65, 577, 65), (192, 576, 192), (64, 576, 576), (64, 576, 1)]
)
def test_equals_the_rule_at_real_sizes(slots: int, tokens: int, keep: int) -> None:
    attention = torch.randn(5, slots, tokens).softmax(dim=1)
    fill = torch.rand(5, tokens)
    indices, from_slots = select_tokens(attention, keep, fill)
    kept, counts = oracle(attention, keep, fill)
    assert indices.tolist() == kept
    assert from_slots.tolist() == counts


def test_all_slots_agree() -> None:
    attention = torch.full((1, 8, 10), 0.1)
    attention[:, :, 7] = 0.9
    indices, from_slots = select_tokens(attention, 3, torch.arange(10.0)[None])
    assert indices.tolist() == [[7, 8, 9]]
    assert from_slots.tolist() == [1]


def test_more_picks_than_budget_keeps_the_best_scored_picks() -> None:
    attention = torch.eye(4)[None]  # slot k picks token k
    indices, from_slots = select_tokens(attention, 2, torch.tensor([[1.0, 4.0, 2.0, 3.0]]))
    assert indices.tolist() == [[1, 3]]
    assert from_slots.tolist() == [2]


def test_infinite_scores_do_not_displace_a_pick() -> None:
    attention = torch.eye(3, 5)[None]
    fill = torch.tensor([[0.0, 0.0, 0.0, torch.inf, torch.inf]])
    indices, _ = select_tokens(attention, 3, fill)
    assert indices.tolist() == [[0, 1, 2]]


def test_batch_and_layout_do_not_matter() -> None:
    attention = torch.randn(4, 16, 50)
    fill = torch.randn(4, 50)
    together, _ = select_tokens(attention, 20, fill)
    strided = attention.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(select_tokens(strided, 20, fill)[0], together)
    for image in range(4):
        alone, _ = select_tokens(attention[image : image + 1], 20, fill[image : image + 1])
        assert torch.equal(alone[0], together[image])


def test_gather_and_its_gradient() -> None:
    x = torch.randn(3, 11, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 3, 10], [1, 2, 3], [4, 5, 9]])
    rows = gather_tokens(x, indices)
    assert torch.equal(rows, torch.stack([x[b, indices[b]] for b in range(3)]))
    weights = torch.randn_like(rows)
    (rows * weights).sum().backward()
    expected = torch.zeros_like(x)
    for b in range(3):
        expected[b, indices[b]] = weights[b]
    assert torch.equal(x.grad, expected)
    assert torch.autograd.gradcheck(lambda t: gather_tokens(t, indices), x)


def test_rows_from_keys_and_their_gradient() -> None:
    attention, fill = torch.rand(3, 4, 11), torch.rand(3, 11)
    x = torch.randn(3, 11, 5, dtype=torch.float64, requires_grad=True)
    want = select_rows(attention, 6, fill, x)
    got = select_from_keys(keys_of(attention, 3), 6, fill, x)
    assert all(map(torch.equal, got, want))
    weights = torch.randn(3, 6, 5, dtype=torch.float64)
    gradients = [torch.autograd.grad((r[2] * weights).sum(), x)[0] for r in (got, want)]
    assert torch.equal(*gradients)


def test_compiles_without_graph_breaks() -> None:
    compiled = torch.compile(lambda a, f: select_tokens(a, 8, f), fullgraph=True, backend="aot_eager")
    attention, fill = torch.randn(2, 8, 30), torch.randn(2, 30)
    for got, want in zip(compiled(attention, fill), select_tokens(attention, 8, fill), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": 0}, ValueError, "between 1 and 10"),
        ({"keep": 11}, ValueError, "between 1 and 10"),
        ({"keep": 4.0}, TypeError, "must be an int"),
        ({"keep": True}, TypeError, "must be an int"),
        ({"slot_attention": torch.rand(3, 10)}, ValueError, r"\[B, K, N\]"),
        ({"slot_attention": torch.ones(1, 3, 10, dtype=torch.int64)}, TypeError, "floating point"),
        ({"slot_attention": torch.rand(1, 0, 10)}, ValueError, "needs a slot"),
        ({"fill_scores": torch.rand(1, 9)}, ValueError, r"\[B, N\]"),
        ({"fill_scores": torch.rand(10)}, ValueError, r"\[B, N\]"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        (
            {"slot_attention": torch.rand(1, 3, 10, dtype=torch.float64), "backend": "triton"},
            BackendUnavailableError,
            "can't run its Triton kernel",
        ),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"slot_attention": torch.rand(1, 3, 10), "keep": 4, "fill_scores": None, **change}
    with pytest.raises(error, match=message):
        select_tokens(**arguments)


def test_bad_gather() -> None:
    with pytest.raises(TypeError, match="int64"):
        gather_tokens(torch.rand(1, 4, 2), torch.tensor([[0, 1]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[B, keep\]"):
        gather_tokens(torch.rand(2, 4, 2), torch.tensor([[0, 1]]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": 0}, ValueError, "between 1 and 10"),
        ({"keep": 11}, ValueError, "between 1 and 10"),
        ({"keep": True}, TypeError, "must be an int"),
        ({"keys": torch.zeros(2, 1, 3, dtype=torch.int32)}, TypeError, "keys must be int64"),
        ({"keys": torch.zeros(2, 1, 3)}, TypeError, "keys must be int64"),
        ({"keys": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"\[B, T, K\]"),
        ({"scores": torch.rand(1, 10)}, ValueError, r"\[B, N\]"),
        ({"scores": torch.rand(2, 1, 10)}, ValueError, r"\[B, N\]"),
        ({"scores": torch.ones(2, 10, dtype=torch.int64)}, TypeError, "floating point"),
        ({"scores": None}, TypeError, "must be a torch.Tensor"),
        ({"scores": torch.empty(2, 10, device="meta")}, ValueError, "scores are on meta, keys on cpu"),
        ({"x": torch.rand(2, 9, 4)}, ValueError, r"\[B, N, C\]"),
        ({"x": torch.rand(2, 10)}, ValueError, r"\[B, N, C\]"),
        ({"x": torch.empty(2, 10, 4, device="meta")}, ValueError, "x are on meta, keys on cpu"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        (
            {"scores": torch.rand(2, 10, dtype=torch.float64), "backend": "triton"},
            BackendUnavailableError,
            "can't run its Triton kernel",
        ),
    ],
)
def test_bad_keys(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"keys": keys_of(torch.rand(2, 3, 10)), "keep": 4, "scores": torch.rand(2, 10), **change}
    with pytest.raises(error, match=message):
        select_from_keys(**arguments)


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 1, 0)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_keys_of_nothing(backend: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="need a slot"):
        select_from_keys(torch.zeros(shape, dtype=torch.int64), 4, torch.rand(2, 10), backend=backend)
