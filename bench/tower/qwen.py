"""Qwen2.5-VL's tower: it must run to its end, but the merger need not merge all units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.micro.gates import require_equal, require_error, worst_error
from bench.tower.step import Results, Step
from ocvtp.vlm.towers.qwen import run_qwen_tower

#: Units kept of an image.
KEEPS = (64, 32)
#: Largest relative error of an image's rows and of its scores, against transformers.
_BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 5e-2)}
_MERGE = 2
_FRAMES = 2  # that a patch spans


@dataclass(frozen=True)
class QwenShape:
    """Qwen2.5-VL's tower and a square image; FLOPs are those of matrix products, two for a multiply-add.

    Attributes:
        full: blocks with full attention.
        image: pixels along a side.
        window: pixels along a side of an attention window.
        out: width of the language model.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    full: tuple[int, ...]
    image: int
    patch: int
    window: int
    out: int

    @property
    def side(self) -> int:
        """Patches along the image's side."""
        return self.image // self.patch

    @property
    def patches(self) -> int:
        """Of an image."""
        return self.side**2

    @property
    def units(self) -> int:
        """Of 2 x 2 patches."""
        return self.patches // _MERGE**2

    @property
    def projection(self) -> int:
        """Queries, keys and values of all patches."""
        return 2 * self.patches * 3 * self.width**2

    @property
    def scores(self) -> int:
        """Queries times keys, in a block with full attention."""
        return 2 * self.patches**2 * self.width

    @property
    def blocks(self) -> int:
        """The patch embedding and all blocks."""
        per_window = self.window // self.patch
        whole, left = divmod(self.side, per_window)
        within_windows = (whole * per_window**2 + left**2) ** 2
        pairs = len(self.full) * self.patches**2 + (self.layers - len(self.full)) * within_windows
        linear = self.projection + 2 * self.patches * (self.width**2 + 3 * self.width * self.mlp)
        embedding = 2 * self.patches * 3 * _FRAMES * self.patch**2 * self.width
        return embedding + self.layers * linear + 4 * pairs * self.width

    def merger(self, units: int) -> int:
        """Two linear layers on some units."""
        joined = _MERGE**2 * self.width
        return 2 * units * (joined**2 + joined * self.out)

    def build(self) -> Any:
        """A tower with random weights, on sdpa attention."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

        vision = {
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "depth": self.layers,
            "num_heads": self.heads,
            "fullatt_block_indexes": list(self.full),
            "patch_size": self.patch,
            "window_size": self.window,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": _FRAMES,
            "out_hidden_size": self.out,
        }
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 8,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
        torch.manual_seed(0)
        config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, attn_implementation="sdpa")
        return Qwen2_5_VLModel(config).visual.eval()

    def bench(self, batch: int, device: torch.device) -> QwenBench:
        """With some images on a device."""
        return QwenBench(self, batch, device)


QWENS = {"qwen2.5-vl": QwenShape(1280, 3420, 32, 16, (7, 15, 23, 31), 448, 14, 112, 3584)}


class QwenBench:
    """A tower, images, and what transformers makes of them.

    Args:
        shape: of the tower.
        batch: images.
        device: float32 on a CPU, bfloat16 on a GPU.
        keeps: numbers of units kept.
    """

    def __init__(
        self, shape: QwenShape, batch: int, device: torch.device, keeps: Sequence[int] = KEEPS
    ) -> None:
        self.batch = batch
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._shape, self._keeps = shape, sorted(keeps, reverse=True)
        self._tower = shape.build().to(device, self.dtype)
        generator = torch.Generator().manual_seed(0)
        values = 3 * _FRAMES * shape.patch**2
        pixels = torch.randn(batch * shape.patches, values, generator=generator)
        self._pixels = pixels.to(device, self.dtype)
        self._grid = torch.tensor([[1, shape.side, shape.side]] * batch)
        self._kept = {
            keep: torch.cat(
                [
                    i * shape.units + torch.randperm(shape.units, generator=generator)[:keep].sort().values
                    for i in range(batch)
                ]
            ).to(device)
            for keep in keeps
        }
        with torch.inference_mode():
            self._rows, self._scores = self._wanted()
            self._run = run_qwen_tower(self._tower, self._pixels, self._grid, ())

    def steps(self) -> list[Step]:
        """All steps, each leaving out something that the one before computes."""
        shape = self._shape
        scores, everything = shape.scores + shape.projection, shape.units

        def step(
            part: str, what: str, flops: int, run: Callable[[], Results], check: Callable[[Results], None]
        ) -> Step:
            return Step(part, what, self.batch * flops, run, check)

        most = self._keeps[0]
        tower, alone = partial(step, "tower"), partial(step, "after the blocks")
        return [
            tower(
                "transformers, no scores", shape.blocks + shape.merger(everything), self._upstream, self._same
            ),
            tower(
                "and scores, projected again",
                shape.blocks + scores + shape.merger(everything),
                self._scored,
                self._same,
            ),
            tower(
                f"and the merger for {most} units",
                shape.blocks + scores + shape.merger(most),
                partial(self._scored, most),
                partial(self._near, most),
            ),
            alone("scores, projected again", scores, self._only_scores, self._near_scores),
            alone("merger, all units", shape.merger(everything), self._merged, self._same),
            *(
                alone(
                    f"merger, {keep} units",
                    shape.merger(keep),
                    partial(self._merged, keep),
                    partial(self._near, keep),
                )
                for keep in self._keeps
            ),
        ]

    def _wanted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All merged units, and attention that each receives in the last block, from its map."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        shape, attention, seen = self._shape, self._tower.blocks[-1].attn, {}
        hooks = [
            attention.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True),
            attention.qkv.register_forward_hook(lambda _, __, out: seen.update(qkv=out)),
        ]
        rows = self._tower(self._pixels, grid_thw=self._grid).pooler_output
        for hook in hooks:
            hook.remove()
        query, key, _ = seen["qkv"].unflatten(-1, (3, shape.heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *seen["position_embeddings"])
        query, key = (
            part.float().unflatten(0, (self.batch, shape.patches)).transpose(1, 2) for part in (query, key)
        )
        received = (query @ key.mT * attention.scaling).softmax(-1).mean((1, 2))
        by_window = received.flatten().unflatten(0, (-1, _MERGE**2)).sum(-1)
        order = self._tower_order().to(by_window.device)
        return rows, torch.empty_like(by_window).index_copy_(0, order, by_window).unflatten(
            0, (self.batch, -1)
        )

    def _tower_order(self) -> torch.Tensor:
        """Units in the tower's order: window after window, image after image."""
        shape = self._shape
        side, per_window = shape.side // _MERGE, shape.window // shape.patch // _MERGE
        unit = torch.arange(shape.units)
        row, column = unit // side, unit % side
        window = row // per_window * side + column // per_window
        order = window.argsort(stable=True)
        return torch.cat([order + i * shape.units for i in range(self.batch)])

    def _upstream(self) -> Results:
        return (self._tower(self._pixels, grid_thw=self._grid).pooler_output,)

    def _scored(self, keep: int | None = None) -> Results:
        run = run_qwen_tower(self._tower, self._pixels, self._grid, ())
        scores = run.received_attention("auto")
        return run.merged(None if keep is None else self._kept[keep]), scores

    def _merged(self, keep: int | None = None) -> Results:
        return (self._run.merged(None if keep is None else self._kept[keep]),)

    def _only_scores(self) -> Results:
        return (self._run.received_attention("auto"),)

    def _same(self, results: Results) -> None:
        require_equal("merged units", results[0], self._rows)
        self._near_scores(results[1:])

    def _near(self, keep: int, results: Results) -> None:
        got, want = (
            rows.unflatten(0, (self.batch, -1)).flatten(1)
            for rows in (results[0], self._rows[self._kept[keep]])
        )
        require_error("merged units", worst_error(got, want), _BOUNDS[self.dtype][0])
        self._near_scores(results[1:])

    def _near_scores(self, scores: Results) -> None:
        for given in scores:
            got = given.float().unflatten(0, (self.batch, -1))
            require_error("scores", worst_error(got, self._scores), _BOUNDS[self.dtype][1])
