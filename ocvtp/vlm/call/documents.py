"""Several documents packed into one row: where they begin, and how the model learns it of the short prompt.

transformers finds documents in ``position_ids`` that start over, if there is neither a mask nor a cache. The
short prompt's positions can't say it: those of kept tokens have gaps, which it would take for documents too.
So the mask is made here, document by document, by the function that the model makes its own with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.vlm.call.frame import Frame
from ocvtp.vlm.call.prompt import take
from ocvtp.vlm.contracts.adapter import Adapter


@dataclass(frozen=True)
class Documents:
    """Documents in the columns of a call, one behind the other.

    Attributes:
        begins: ``[B, n]`` whether one begins in a column; so does every column of padding.
        positions: ``[B, n]`` position of the first token of the column's document.
        padding: ``[B, n]`` whether a column is padding.
    """

    begins: torch.Tensor
    positions: torch.Tensor
    padding: torch.Tensor

    def short(self, index: torch.Tensor) -> Documents:
        """What is left of them in the columns ``index`` ``[B, short]``."""
        number = take(self.begins.cumsum(1), index, -1)
        begins = torch.ones_like(number, dtype=torch.bool)
        begins[:, 1:] = (number[:, 1:] != number[:, :-1]) | (index[:, 1:] < 0)
        return Documents(begins, take(self.positions, index, 0), index < 0)

    def renumbered(self) -> torch.Tensor:
        """Positions ``[B, n]`` without gaps, from each document's first on; 0 on padding."""
        column = torch.arange(self.begins.shape[1], device=self.begins.device)
        numbers = self.positions + column - _first_column(self.begins)
        return numbers.masked_fill(self.padding, 0)

    def spans(self) -> list[tuple[int, int, int]]:
        """Row, first column and the one behind the last of each document; not of those of one column."""
        width = self.begins.shape[1]
        starts = self.begins.nonzero().tolist()
        ends = [*starts[1:], [len(self.begins), 0]]
        found = [
            (row, start, stop if row == after else width)
            for (row, start), (after, stop) in zip(starts, ends, strict=True)
        ]
        return [span for span in found if span[2] - span[1] > 1]


def documents_of(
    adapter: Adapter, frame: Frame, positions: torch.Tensor | None, arguments: Mapping[str, Any]
) -> Documents | None:
    """The documents that the unpatched model would find; ``None`` if every row is one.

    Args:
        adapter: of the model.
        frame: of the call.
        positions: ``[B, new]`` of text, as the caller passed them.
        arguments: of the call.
    """
    if positions is None or not _are_read(adapter, frame):
        return None
    step = torch.diff(positions, dim=1)
    # Where a cache is made, transformers reads no documents at all: then only a restart tells one.
    starts = step < 1 if _makes_cache(adapter, arguments) or is_flash(adapter) else step != 1
    if torch.compiler.is_compiling():
        message = "position_ids start over within a row, and a traced call takes one document per row"
        torch._assert_async(~starts.any(), message)
        return None
    if not bool(starts.any()):
        return None
    begins = torch.nn.functional.pad(starts, (1, 0), value=True)
    return Documents(begins, positions.gather(1, _first_column(begins)), torch.zeros_like(begins))


def mask_of(
    adapter: Adapter, documents: Documents, positions: torch.Tensor, types: torch.Tensor | None
) -> Any:
    """The attention mask ``[B, 1, n, n]`` of documents that don't see each other, or one per kind of layer.

    ``None`` for flash attention, which takes no such mask and finds the documents in ``positions``.

    Args:
        adapter: of the model.
        documents: of the short columns.
        positions: ``[B, n]`` of text in them.
        types: ``token_type_ids`` ``[B, n]``.

    Raises:
        ValueError: the attention or the model can't be told of these documents.
    """
    if is_flash(adapter):
        _check_positions(positions, documents)
        return None
    whole: dict[str, torch.Tensor] = {}
    for row, start, stop in documents.spans() or [(0, 0, 1)]:
        of_it = None if types is None else types[row : row + 1, start:stop]
        made = _alone(adapter, stop - start, documents.begins.device, of_it)
        for layer, mask in (made if isinstance(made, dict) else {"": made}).items():
            if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
                name = adapter.model.config.get_text_config()._attn_implementation
                raise ValueError(
                    f"{name} attention takes no mask by which documents packed into one row could be told "
                    'apart once they are pruned; use attn_implementation="sdpa"'
                )
            if layer not in whole:
                whole[layer] = _nothing(mask, documents.begins.shape)
            whole[layer][row, 0, start:stop, start:stop] = mask[0, 0, :-1, :-1]
    first, *others = whole.values()
    if not others:
        return first
    if adapter.masks_by_layer:
        return whole
    if all(torch.equal(first, other) for other in others):
        return first
    raise ValueError(
        "documents longer than the sliding window can't be packed into one row of this model and pruned"
    )


def _alone(adapter: Adapter, tokens: int, device: torch.device, types: torch.Tensor | None) -> Any:
    """The mask of a document by itself, with one column of padding: else there might be none."""
    from transformers.masking_utils import create_masks_for_generate

    model = adapter.model
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    shape = torch.empty((1, tokens + 1, 0), dtype=model.dtype, device=device)
    live = torch.ones((1, tokens + 1), dtype=torch.long, device=device)
    live[:, -1] = 0
    passed: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": shape,
        "input_embeds": shape,  # its name before transformers 5.3
        "attention_mask": live,
        "past_key_values": None,
        "position_ids": None,
        "cache_position": torch.arange(tokens + 1, device=device),  # then as well
        "is_first_iteration": True,
    }
    if types is not None:
        passed["token_type_ids"] = torch.nn.functional.pad(types, (0, 1))
    return make(**passed)


def _check_positions(positions: torch.Tensor, documents: Documents) -> None:
    """Raise ``ValueError`` unless flash attention finds these documents in ``positions`` ``[B, n]``.

    It looks in a single row, for every token whose position is the lowest of all.
    """
    single = len(positions) == 1 and not bool(documents.padding.any())
    if not single or not torch.equal(positions == positions.amin(), documents.begins):
        raise ValueError(
            "flash attention finds documents only in a single row and by position_ids that all start over at "
            'the same number; pack them so, or use attn_implementation="sdpa"'
        )


def _nothing(like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A mask like that of a document, by which every column of ``shape`` sees itself alone."""
    itself = torch.eye(shape[1], dtype=torch.bool, device=like.device).expand(shape[0], 1, -1, -1)
    if like.dtype == torch.bool:
        return itself.clone()
    nowhere = torch.finfo(like.dtype).min
    return torch.zeros_like(itself, dtype=like.dtype).masked_fill(~itself, nowhere)


def _first_column(begins: torch.Tensor) -> torch.Tensor:
    """Column in which each column's document begins, ``[B, n]``."""
    column = torch.arange(begins.shape[1], device=begins.device)
    return torch.where(begins, column, 0).cummax(1).values


def _are_read(adapter: Adapter, frame: Frame) -> bool:
    """Whether restarts mean documents: not beside a mask, but flash attention forgets one of ones."""
    if frame.mask is None:
        return True
    return is_flash(adapter) and len(frame.ids) == 1 and bool((frame.mask != 0).all())


def is_flash(adapter: Adapter) -> bool:
    """Whether the language model runs flash attention, which takes no mask but that of padding."""
    return "flash" in str(adapter.model.config.get_text_config()._attn_implementation)


def _makes_cache(adapter: Adapter, arguments: Mapping[str, Any]) -> bool:
    if arguments.get("past_key_values") is not None:
        return True
    given = arguments.get("use_cache")
    return bool(
        getattr(adapter.model.config.get_text_config(), "use_cache", True) if given is None else given
    )


def text_positions(adapter: Adapter, frame: Frame, given: Any) -> torch.Tensor | None:
    """What the caller passed in one dimension, ``[B, new]``: where transformers looks for documents."""
    if given is None or (adapter.mrope and len(given) != 4):
        return None
    text = given[0] if adapter.mrope else given
    return text[:, -frame.ids.shape[1] :].expand(len(frame.ids), -1)
