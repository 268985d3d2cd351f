"""How many vision tokens a method leaves the layers, by the three ways they are counted, and back.

"192 tokens" means tokens behind a cut (FastV, DART), what leaves the layers on average (SparseVLM), or what
goes into them on average (PyramidDrop), which is what is computed. Compare methods by the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ocvtp.methods.in_llm.contract import Method
from ocvtp_kernels._checks import as_float, as_int


@dataclass(frozen=True)
class Averages:
    """Vision tokens of one prompt in the layers of a language model.

    Attributes:
        nominal: behind each cut, merged ones among them.
        layers: that go into each layer.
        entering: their average: what is computed.
        leaving: the average of what comes out of the layers: a cut counts for the layer before it.
    """

    nominal: tuple[int, ...]
    layers: tuple[int, ...]
    entering: float
    leaving: float


def averages(method: Method, *, depth: int, tokens: int) -> Averages:
    """Of a prompt of ``tokens`` vision tokens in a language model of ``depth`` layers.

    Raises:
        ValueError: the method cuts deeper.
    """
    check_depth(method, depth)
    present, nominal = tokens, []
    for cut in range(len(method.cuts)):
        present = sum(method.left(cut, present, tokens))
        nominal.append(present)
    layers = []
    for layer in range(depth + 1):
        passed = sum(cut <= layer for cut in method.cuts)
        layers.append(nominal[passed - 1] if passed else tokens)
    return Averages(tuple(nominal), tuple(layers[:-1]), sum(layers[:-1]) / depth, sum(layers[1:]) / depth)


def check_depth(method: Method, depth: int) -> None:
    """Raise ``ValueError`` for cuts that a language model of ``depth`` layers doesn't have."""
    if method.cuts and method.cuts[-1] > depth:
        raise ValueError(
            f"{method.name} would cut before layer {method.cuts[-1]}, counted from 0, and the language model "
            f"has {depth}: use layers of this model"
        )


def check_average(average: object, tokens: int | None) -> float:
    """``average`` as a share of ``tokens``.

    Raises:
        TypeError, ValueError: it is none.
    """
    share = as_float(average)
    count = as_int(average)
    if share is None and count is None:
        raise TypeError(f"average must be a number of tokens or a share of them; got {average!r}")
    if count is None and share is not None and share <= 1:
        if share <= 0:
            raise ValueError(f"average must be positive; got {average}")
        return share
    if tokens is None:
        raise TypeError(f"average={average} is a number of tokens: say of how many, tokens=576 for one")
    number = float(count) if count is not None else float(share or 0)
    if not 0 < number <= tokens:
        raise ValueError(
            f"average must be between 0 and {tokens}, the vision tokens of a prompt; got {average}"
        )
    return number / tokens


def fit_single(average: int | float, depth: int, tokens: int | None, layer: int) -> int | float:
    """What to keep behind one cut before ``layer`` for an ``average`` by what goes in: a number, or a share.

    Raises:
        TypeError, ValueError: an average that can't be had; the message has the range.
    """
    share = check_average(average, tokens)
    if not 1 <= layer < depth:
        raise ValueError(
            f"layer must be between 1 and {depth - 1}, layers of the language model; got {layer}"
        )
    kept = (depth * share - layer) / (depth - layer)
    found = kept if tokens is None else round(kept * tokens)
    if kept <= 0 or found == 0:
        raise _unreachable(average, layer / depth, tokens, f"one cut before layer {layer}")
    return found


def fraction_that_fits(
    got: Callable[[float], float],
    share: float,
    tokens: int | None,
    name: str,
    cuts: tuple[int, ...],
    depth: int,
) -> float:
    """The highest fraction in ``[0, 1]``, to 1e-4, at which the rising ``got`` isn't above ``share``.

    Raises:
        ValueError: there is none; the message has the range.
    """
    if cuts[-1] >= depth:
        raise ValueError(f"cuts before layers {list(cuts)} need more than {depth} layers")
    low, high = 0, 10_000
    if got(low / high) > share + 1e-9:
        asked = share if tokens is None else round(share * tokens, 1)
        raise _unreachable(asked, got(0.0), tokens, f"{name} with cuts before layers {list(cuts)}")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if got(middle / 10_000) <= share + 1e-9 else (low, middle - 1)
    return low / 10_000


def _unreachable(average: object, floor: float, tokens: int | None, what: str) -> ValueError:
    share = isinstance(average, float) and average <= 1
    asked = f"{average:.1%} of the" if share else f"{average}"
    reach = f"{floor:.1%} and 100%" if tokens is None else f"{floor * tokens:.1f} and {tokens} tokens"
    return ValueError(
        f"{what} can't have layers average {asked} vision tokens: those before the first cut get all of "
        f"them, so it is between {reach}. Ask for more, or cut earlier"
    )
