"""Runs the vision tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL layer by layer.

transformers merges all patches, delivers hidden states in the order of its attention windows and never the
attention maps. This loop calls the tower's own submodules (so LoRA, quantised linears and offload hooks keep
working), needs no forward hooks, which threads would share, and hands out everything by merged unit in the
original order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ocvtp.vlm.contracts.weights import inside
from ocvtp.vlm.layouts.qwen_geometry import Geometry, Grid, as_grids, corners, geometry
from ocvtp.vlm.layouts.units import full_blocks, scored_block, window_units
from ocvtp_kernels.received_attention import received_attention


class QwenTowerRun:
    """One run over the patches of a batch of images or videos.

    Units are numbered through the batch: image after image, frame after frame, raster order in a frame.

    Attributes:
        grids: frames, rows and columns of patches of each image or video.
        merge: patches along the side of a unit.
        tower: that ran.
    """

    def __init__(self, tower: Any, grids: tuple[Grid, ...], merge: int, plan: Geometry) -> None:
        self.grids = grids
        self.merge = merge
        self.tower = tower
        self._plan = plan
        self._features: dict[int, torch.Tensor] = {}
        self._stacked: dict[int, torch.Tensor] = {}  # outputs that DeepStack reads
        self._inputs: dict[int, torch.Tensor] = {}  # of blocks whose attention may be asked for
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self._last: torch.Tensor | None = None

    def features(self, layer: int) -> torch.Tensor:
        """``[units, C]``: mean over the patches of each unit of what the tapped block ``layer`` put out."""
        return self._features[layer]

    def received_attention(self, backend: str, layer: int | None = None) -> torch.Tensor:
        """Attention each unit receives in a block with full attention, ``[units]``, >= float32.

        Mean over heads and over the queries of the unit's own frame, summed over the unit's patches, so each
        frame's scores sum to 1. Queries and keys are projected a second time from the block's input: one qkv
        projection more than the tower has; catching them on their way would take forward hooks, which
        concurrent calls trip over.

        Args:
            backend: of the operation.
            layer: of the block: the last one with full attention, or one of those asked for.

        Raises:
            ValueError: a tower without a block of full attention, where scores could not be compared.
        """
        with torch.no_grad():
            query, key = self._query_key(layer)
            scaling = self.tower.blocks[0].attn.scaling
            received: torch.Tensor | None = None
            for length, count, rows in self._plan.equal_frames:
                index = None if rows is None else rows.to(query.device, non_blocking=True)
                q, k = (
                    (part if index is None else part[index]).unflatten(0, (count, length)).transpose(1, 2)
                    for part in (query, key)
                )
                scores = received_attention(q, k, scaling, backend=backend).flatten()
                if index is None:
                    received = scores
                else:
                    received = scores.new_empty(len(query)) if received is None else received
                    received.index_copy_(0, index, scores)
            assert received is not None
            return self._original(received.unflatten(0, (-1, self.merge**2)).sum(-1))

    def mean_keys(self) -> torch.Tensor:
        """``[units, d]``, at least float32: keys of the last block with full attention, after rotation.

        Mean over heads and over the patches of each unit.
        """
        with torch.no_grad():
            _, key = self._query_key(None)
            wide = key.to(torch.promote_types(key.dtype, torch.float32))
            return self._original(wide.unflatten(0, (-1, self.merge**2)).mean((1, 2)))

    def _query_key(self, layer: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """``[patches, heads, d]`` each, rotated, in the tower's order."""
        where = scored_block(self.tower, len(self.tower.blocks)) if layer is None else layer
        if where is None or where not in self._inputs or self._angles is None:
            raise ValueError("this tower has no block with full attention; choose a selector without scores")
        block = self.tower.blocks[where]
        attention = block.attn
        projected = inside(
            (block, attention), lambda hidden: attention.qkv(block.norm1(hidden)), self._inputs[where]
        )
        query, key = projected.unflatten(-1, (3, attention.num_heads, -1)).unbind(1)[:2]
        cos, sin = (angle.to(query.device).unsqueeze(1) for angle in self._angles)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)

    def merged(self, units: torch.Tensor | None = None) -> torch.Tensor:
        """``pooler_output[units]`` of upstream's forward, ``[k, D]``; the merger runs on these units only.

        ``None`` is all units, bit-equal to ``pooler_output``.
        """
        assert self._last is not None
        return self._merge(self.tower.merger, self._last, units)

    def deepstack(self, units: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """``deepstack_features`` of upstream at ``units``, ``[k, D]`` each; empty without DeepStack."""
        layers = _stacked_layers(self.tower)
        mergers = getattr(self.tower, "deepstack_merger_list", ())
        return tuple(
            self._merge(mergers[layers.index(layer)], output, units)
            for layer, output in self._stacked.items()
        )

    def units(self) -> tuple[torch.Tensor, ...]:
        """``[units, merge**2 * C]`` that the mergers read, a unit's patches side by side: the last block's
        output, and those that DeepStack takes."""
        assert self._last is not None
        return tuple(
            self._original(patches.unflatten(0, (-1, self.merge**2)).flatten(1))
            for patches in (self._last, *self._stacked.values())
        )

    def merge_units(self, units: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the mergers make of :meth:`units`, or of means of them, ``[n, merge**2 * C] -> [n, D]``."""
        layers = _stacked_layers(self.tower)
        mergers = getattr(self.tower, "deepstack_merger_list", ())
        each = [self.tower.merger, *(mergers[layers.index(layer)] for layer in self._stacked)]
        return [
            merger(one.unflatten(1, (self.merge**2, -1)).flatten(0, 1))
            for merger, one in zip(each, units, strict=True)
        ]

    def _merge(self, merger: Any, patches: torch.Tensor, units: torch.Tensor | None) -> torch.Tensor:
        if units is None:
            everything: torch.Tensor = merger(patches)
            return self._original(everything)
        at = units.to(patches.device)
        if self._plan.places is not None:
            at = self._plan.places.to(patches.device, non_blocking=True)[at]
        kept: torch.Tensor = merger(patches.unflatten(0, (-1, self.merge**2))[at].flatten(0, 1))
        return kept

    def _original(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows by unit, from the tower's order to the original one."""
        if self._plan.places is None:
            return rows
        return rows[self._plan.places.to(rows.device, non_blocking=True)]

    def _tap(self, layer: int, output: torch.Tensor) -> torch.Tensor:
        self._features[layer] = self._original(output.unflatten(0, (-1, self.merge**2)).mean(1))
        return self._features[layer]


def run_qwen_tower(
    tower: Any,
    pixels: torch.Tensor,
    grid_thw: torch.Tensor | Sequence[Sequence[int]],
    taps: Collection[int],
    after: Callable[[int, torch.Tensor], None] | None = None,
    inputs: Collection[int] = (),
    ahead: Callable[[QwenTowerRun, Any, Sequence[torch.Tensor]], None] | None = None,
) -> QwenTowerRun:
    """Run all blocks of the tower; mergers run when the run is asked for their rows.

    Args:
        tower: ``model.model.visual`` of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        pixels: ``[patches, values of a patch]``, as the processor delivers them, or in another shape.
        grid_thw: ``[images or videos, 3]``.
        taps: indices of the blocks whose features are wanted.
        after: called with each of them and its features as soon as they are there, before the
            next block runs.
        inputs: blocks with full attention whose attention will be asked for, beside the last of them.
        ahead: called before the last block with full attention runs: with the run, which can tell what its
            patches receive from then on, that block, and what is read for that.

    Raises:
        ValueError: taps that the tower does not have, grids that are not of whole units, or pixels that don't
            fit them.
    """
    merge = int(tower.spatial_merge_size)
    grids = as_grids(grid_thw, merge)
    depth = len(tower.blocks)
    if not all(0 <= layer < depth for layer in taps):
        raise ValueError(f"taps must be blocks 0..{depth - 1} of this tower; got {sorted(taps)}")
    patches = sum(t * h * w for t, h, w in grids)
    embed = tower.patch_embed  # reads values in a row, whatever their shape: collators add a dimension
    pixels = pixels.reshape(-1, embed.in_channels * embed.temporal_patch_size * embed.patch_size**2)
    if len(pixels) != patches:
        raise ValueError(f"the grids {list(grids)} hold {patches} patches, but there are {len(pixels)}")

    full = full_blocks(tower)
    hidden = tower.patch_embed(pixels)
    pinned = hidden.device.type == "cuda"
    plan = geometry(grids, merge, window_units(tower), pinned)
    hidden = _embed_positions(tower, hidden, grids, merge, pinned)
    if plan.order is not None:
        order = plan.order.to(hidden.device, non_blocking=True)
        hidden = hidden.unflatten(0, (-1, merge**2))[order].flatten(0, 1)

    run = QwenTowerRun(tower, grids, merge, plan)
    run._angles = _rotary(tower.rotary_pos_emb, hidden, plan)
    arguments = {
        where: _attention_arguments(tower, bounds, longest, hidden.device)
        for where, bounds, longest in (
            (True, plan.frames, plan.longest_frame),
            (False, plan.windows, plan.longest_window),
        )
    }
    scored, stacked = scored_block(tower, depth), _stacked_layers(tower)
    for layer, block in enumerate(tower.blocks):
        if layer == scored or layer in inputs:
            run._inputs[layer] = hidden
        if ahead is not None and layer == scored:
            ahead(run, block, [hidden, *run._angles])
        hidden = block(hidden, position_embeddings=run._angles, **arguments[full is None or layer in full])
        if layer in stacked:
            run._stacked[layer] = hidden
        if layer in taps:
            features = run._tap(layer, hidden)
            if after is not None:
                after(layer, features)
    run._last = hidden
    return run


def _stacked_layers(tower: Any) -> list[int]:
    return list(getattr(tower, "deepstack_visual_indexes", ()))


def _embed_positions(
    tower: Any, hidden: torch.Tensor, grids: tuple[Grid, ...], merge: int, pinned: bool
) -> torch.Tensor:
    """Qwen3-VL's absolute position embeddings, resampled from a square table; others have none.

    Sampling weights are made on the CPU: where upstream makes them on a GPU, they may differ by a rounding.
    """
    if not hasattr(tower, "pos_embed"):
        return hidden
    # Releases round the weights in three ways. 5.17 was the first to name the way it interpolates.
    closed_form = hasattr(tower, "interpolation_mode")
    table = corners(grids, merge, int(tower.num_grid_per_side), closed_form, pinned)
    rows = tower.pos_embed(table.indices.to(hidden.device, non_blocking=True))
    weights = table.weights.to(rows.device, non_blocking=True).unsqueeze(-1)
    if _takes(tower.rotary_pos_emb, "seqlen"):  # before 5.10: all in the table's precision, one after another
        first, second, third, fourth = (rows * weights.to(rows.dtype)).unbind(1)
        return hidden + (first + second + third + fourth)
    return hidden + (rows * weights).sum(1).to(hidden.dtype)


def _rotary(rotary: Any, hidden: torch.Tensor, plan: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the patches' angles, ``[patches, head_dim]`` each, from the tower's own module."""
    positions = plan.positions.to(hidden.device, non_blocking=True)
    if _takes(rotary, "x"):  # transformers >= 5.17
        cos, sin = rotary(hidden, positions)
        return cos, sin
    if _takes(rotary, "seqlen"):  # before 5.10, a table of angles along one side
        angles = rotary(int(plan.positions.max()) + 1)[positions].flatten(1)
    else:
        angles = rotary(positions)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _attention_arguments(
    tower: Any, bounds: torch.Tensor, longest: int, device: torch.device
) -> dict[str, Any]:
    """What a block wants to know about its sequences.

    sdpa and eager attention split the patches on the host, once per block: bounds that are there already
    spare a wait for the GPU.
    """
    if tower.config._attn_implementation not in ("sdpa", "eager", None):
        bounds = bounds.to(device, non_blocking=True)
    arguments: dict[str, Any] = {"cu_seqlens": bounds}
    if _takes(tower.blocks[0].attn, "max_seqlen"):
        arguments["max_seqlen"] = longest
    return arguments


def _takes(module: torch.nn.Module, parameter: str) -> bool:
    """Whether a module's own forward has a parameter of this name."""
    return parameter in inspect.signature(type(module).forward).parameters


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``x`` ``[patches, heads, head_dim]``, in float32, rounded as in the block."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)
