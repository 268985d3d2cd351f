"""Token selection against a readable Python retelling of the rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocvtp_kernels import BackendUnavailableError
from ocvtp_kernels.selection import gather_tokens, select_tokens


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
