"""What all published methods promise, whatever they choose by."""

from __future__ import annotations

import pytest
import torch

from ocvtp import Selection, methods
from ocvtp.selection import Reduction
from tests.fickle import Fickle
from tests.methods import rivals
from tests.methods.rivals import TOKENS, Inputs, inputs, tensors

each = pytest.mark.parametrize("name", rivals.ALL)


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers: transposed in memory, between others, batch innermost."""
    between = torch.cat([x[:, :1], x, x[:, :1]], dim=1)[:, 1:-1]
    return [x.mT.contiguous().mT, between, x.movedim(0, -1).contiguous().movedim(-1, 0)]


@each
@pytest.mark.parametrize("keep", [2, 5, 7, 12, 33, 63, 64])
def test_the_budget_is_met_with_distinct_tokens(name: str, keep: int) -> None:
    x = inputs()
    result = rivals.ALL[name](x, keep)
    assert result.tokens == TOKENS
    if isinstance(result, Selection):
        assert result.indices.shape == (3, keep)
        assert result.indices.dtype == torch.int64
        assert (result.indices.diff(dim=1) > 0).all()
        assert result.indices.min() >= 0
        assert result.indices.max() < TOKENS
        assert result.from_slots.tolist() == [0, 0, 0]
        return
    check_reduction(result, keep, x.features[:, 1:])


def check_reduction(result: Reduction, keep: int, features: torch.Tensor) -> None:
    batch = len(features)
    assert result.rows.shape == (batch, keep, features.shape[2])
    assert result.rows.dtype == features.dtype
    assert result.slots.shape == (batch, keep)
    assert result.owner.shape == (batch, TOKENS)
    assert result.slots.dtype == result.owner.dtype == torch.int64
    ordered = result.slots.sort(dim=1).values
    assert (ordered.diff(dim=1) > 0).all()
    assert ordered.min() >= 0
    assert ordered.max() < TOKENS
    assert result.owner.min() >= -1
    assert result.owner.max() < keep
    by_place = result.by_place()
    assert torch.equal(by_place.slots, ordered)
    for image in range(batch):
        for token, row in enumerate(result.owner[image].tolist()):
            if row < 0:
                assert by_place.owner[image, token] == -1
                continue
            moved = by_place.owner[image, token]
            assert torch.equal(by_place.rows[image, moved], result.rows[image, row])
            if (result.owner[image] == row).sum() == 1 and result.slots[image, row] != token:
                raise AssertionError(f"row {row} is made of token {token} alone and stands elsewhere")


@each
def test_one_image_is_the_same_to_the_bit_whatever_is_around_it(name: str) -> None:
    x = inputs(4)
    with Fickle():  # a library that rounds by layouts and sizes, on every machine
        whole = tensors(rivals.ALL[name](x, 13))
        for image in range(4):
            alone = tensors(rivals.ALL[name](x.images([image]), 13))
            assert all(torch.equal(a[0], b[image]) for a, b in zip(alone, whole, strict=True))
        order = [2, 0, 3, 1]
        permuted = tensors(rivals.ALL[name](x.images(order), 13))
        assert all(torch.equal(a, b[order]) for a, b in zip(permuted, whole, strict=True))


@each
def test_strides_change_no_bit(name: str) -> None:
    x = inputs()
    with Fickle():
        whole = tensors(rivals.ALL[name](x, 13))
        for kind in range(3):
            strided = x.each(lambda t, kind=kind: layouts(t)[kind] if t.ndim == 3 else t.T.contiguous().T)
            assert not any(t.is_contiguous() for t in (strided.features, strided.row, strided.keys))
            assert all(map(torch.equal, tensors(rivals.ALL[name](strided, 13)), whole))


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    half = inputs().each(lambda t: t.to(dtype))
    result = rivals.ALL[name](half, 13)
    wide = rivals.ALL[name](half.each(torch.Tensor.float), 13)
    if isinstance(result, Reduction):
        assert result.rows.dtype == dtype
        wide.rows = wide.rows.to(dtype)
    assert all(map(torch.equal, tensors(result), tensors(wide)))


@each
def test_float64_stays_float64(name: str) -> None:
    x = inputs().each(torch.Tensor.double)
    result = rivals.ALL[name](x, 13)
    single = rivals.ALL[name](x.each(torch.Tensor.float), 13)
    if isinstance(result, Reduction):
        assert result.rows.dtype == torch.float64
        assert (result.rows - single.rows).abs().max() < 1e-5
        assert (result.rows - single.rows).abs().max() > 0 or name == "trim"


@each
def test_autocast_around_the_call_changes_nothing(name: str) -> None:
    x = inputs()
    whole = tensors(rivals.ALL[name](x, 13))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, tensors(rivals.ALL[name](x, 13)), whole))


@each
def test_rows_alone_are_recorded_for_gradients_and_inputs_stay_as_they_are(name: str) -> None:
    x = inputs()
    kept = x.each(lambda t: t.clone())
    result = rivals.ALL[name](x.each(lambda t: t.clone().requires_grad_()), 13)
    assert [t.requires_grad for t in tensors(result)] == [isinstance(result, Reduction), False, False][
        : len(tensors(result))
    ]
    rivals.ALL[name](x, 13)
    assert all(torch.equal(getattr(x, field), getattr(kept, field)) for field in vars(x))


@each
def test_copies_of_one_token_still_give_a_whole_budget(name: str) -> None:
    x = inputs().each(lambda t: torch.ones_like(t))
    result = rivals.ALL[name](x, 13)
    places = result.indices if isinstance(result, Selection) else result.slots
    assert all(len(set(row)) == 13 for row in places.tolist())


@each
def test_no_size_depends_on_values(name: str) -> None:
    """Nothing waits for a GPU: tensors without values can't be read."""
    x = inputs()
    nothing = rivals.ALL[name](x.each(lambda t: t.to("meta")), 13)
    for there, here in zip(tensors(nothing), tensors(rivals.ALL[name](x, 13)), strict=True):
        assert (there.shape, there.dtype) == (here.shape, here.dtype)


def test_scores_and_steps_read_no_values() -> None:
    x = inputs().each(lambda t: t.to("meta"))
    assert methods.one_head_row(x.keys[:, 0], x.keys).shape == (3, TOKENS)
    assert methods.trim_scores(x.image_embeds, x.text).shape == (3, TOKENS)
    assert methods.relevance_of(x.image_embeds, x.text[:, None], pictures=[0, 1, 0]).shape == (3, TOKENS)
    pairs = methods.tome.match(x.keys, 20, class_token=True)
    rows, size = methods.tome.merge(x.features, torch.ones(3, 65, 1, device="meta"), pairs)
    owner = methods.tome.carry(torch.arange(65, device="meta").expand(3, -1), pairs)
    assert rows.shape[:2] == size.shape[:2] == (3, 45)
    assert methods.tome.raster(owner, 45).shape == (3, 44)


@each
def test_an_empty_batch(name: str) -> None:
    result = rivals.ALL[name](inputs().images([]), 13)
    places = result.indices if isinstance(result, Selection) else result.slots
    assert places.shape == (0, 13)


# With the class token there are 65 rows to make.
WRONG = [(name, keep) for name in rivals.ALL for keep in (0, 65, 66) if (name, keep) != ("visionzip", 65)]


@pytest.mark.parametrize(("name", "keep"), WRONG)
def test_wrong_budgets(name: str, keep: int) -> None:
    with pytest.raises(ValueError, match="must be between 1 and"):
        rivals.ALL[name](inputs(), keep)


@pytest.mark.parametrize("name", [*rivals.CHOOSING, "trim", "prumerge", "tome_post"])
def test_a_budget_that_is_no_number(name: str) -> None:
    with pytest.raises(TypeError, match="keep must be an int"):
        rivals.ALL[name](inputs(), 2.0)  # type: ignore[arg-type]


READS: dict[str, tuple[str, ...]] = {
    "hiprune": ("row", "other_row"),
    "vispruner": ("features", "row"),
    "divprune": ("projected",),
    "cdpruner": ("projected", "row"),
    "trim": ("features", "image_embeds", "text"),
    "visionzip": ("features", "row", "keys"),
    "visionzip_merged": ("features", "row", "keys"),
    "prumerge": ("features", "row", "keys"),
    "prumerge+": ("features", "row", "keys"),
    "tome_post": ("features",),
}
READ = [(name, field) for name, names in READS.items() for field in names]


def changed(x: Inputs, field: str, tensor: torch.Tensor) -> Inputs:
    return x.but(**{field: tensor})


@pytest.mark.parametrize(("name", "field"), READ)
def test_bad_input_raises_before_work(name: str, field: str) -> None:
    x = inputs()
    tensor = getattr(x, field)
    broken = tensor.clone()
    broken.view(3, -1)[1, -2] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        rivals.ALL[name](changed(x, field, broken), 13)
    with pytest.raises(TypeError, match="must be floating point"):
        rivals.ALL[name](changed(x, field, tensor.long()), 13)
    with pytest.raises(ValueError, match="must have shape"):
        rivals.ALL[name](changed(x, field, tensor[None]), 13)
    if len(READS[name]) > 1:
        with pytest.raises(ValueError, match="must have shape"):
            rivals.ALL[name](changed(x, field, tensor[:2]), 13)
        with pytest.raises(ValueError, match=r"is on|must have shape|move one"):
            rivals.ALL[name](changed(x, field, tensor.to("meta")), 13)


def test_every_public_name_is_here() -> None:
    assert set(READS) == set(rivals.ALL)
    named = {name.rstrip("+") for name in rivals.ALL} | set(rivals.OTHERS)
    assert named <= set(methods.__all__)
