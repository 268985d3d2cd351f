"""Test pictures as a tower sees them once, with their questions, so that every selector is asked the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bench.testbed.examples import Example, Split, example
from bench.testbed.model import Size
from bench.testbed.packing import Batch, normalise, pack, shown
from ocvtp.vlm.towers.clip import run_tower

_BATCH = 25


@dataclass(frozen=True)
class TestSet:
    """Pictures of a split.

    Attributes:
        split: of the pictures.
        examples: pictures and questions.
        layers: outputs of encoder layers, ``[P, N, C]``, by number; class token dropped.
        consumed: number of the layer the language model reads.
        received: ``[P, N]`` attention that tokens receive in the consumed layer.
        projected: ``[P, N, D]``: what the language model would read of all tokens.
        size: of the model.
        vocabulary: number of every word.
    """

    __test__ = False  # nothing for pytest

    split: Split
    examples: Sequence[Example]
    layers: dict[int, torch.Tensor]
    consumed: int
    received: torch.Tensor
    projected: torch.Tensor
    size: Size
    vocabulary: dict[str, int]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> torch.Tensor:
        """``[P, N, C]``: what the projector reads."""
        return self.layers[self.consumed]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.size.grid, self.size.grid

    @functools.cached_property
    def batches(self) -> list[Batch]:
        """All questions, packed once for every selector; without pixels, which nobody reads again."""
        device = self.tokens.device
        starts = range(0, len(self), _BATCH)
        return [replace(self.batch(i, i + _BATCH).to(device), pixels=torch.empty(0)) for i in starts]

    @functools.cached_property
    def _shows(self) -> np.ndarray:
        """``[P, N]``: the thing that every token shows, or -1."""
        return np.stack([shown(one, self.size.side, self.size.patch) for one in self.examples])

    def batch(self, start: int, stop: int) -> Batch:
        """Questions of some pictures, packed."""
        some = self.examples[start:stop]
        return pack(some, self.vocabulary, self.size, [1.0] * len(some))

    @property
    def picture_of(self) -> np.ndarray:
        """``[Q]``: the picture that a question is about."""
        return np.repeat(np.arange(len(self)), [len(one.questions) for one in self.examples])

    @property
    def kinds(self) -> np.ndarray:
        """``[Q]``: kinds of the questions."""
        return np.array([question.kind for one in self.examples for question in one.questions])

    def radii(self) -> np.ndarray:
        """``[Q]``: radius in pixels of the smallest thing a question is about; NaN where it is about none."""
        return np.array(
            [
                min((one.scene.things[i].radius for i in question.targets), default=np.nan)
                for one in self.examples
                for question in one.questions
            ]
        )

    def asked_about_things(self) -> np.ndarray:
        """``[Q]``: whether a question is about any thing; not so where the answer is that there is none."""
        return np.array([bool(question.targets) for one in self.examples for question in one.questions])

    def shown(self, kept: torch.Tensor) -> np.ndarray:
        """``[Q]``: whether what a question is about has a kept token on it, of ``[P, keep]`` indices.

        Every thing it is about, or one of those whose existence is asked for; false where it is about none.
        See :func:`bench.testbed.packing.shown`.
        """
        answers = []
        for one, shows, indices in zip(self.examples, self._shows, kept.cpu().numpy(), strict=True):
            on = set(shows[indices].tolist())
            for question in one.questions:
                targets = set(question.targets)
                answers.append(
                    bool(on & targets) if question.kind == "existence" else bool(targets) and targets <= on
                )
        return np.array(answers)


def consumed_layer(model: Any) -> int:
    """0-based number of the encoder layer that the language model reads."""
    number: int = model.config.vision_feature_layer % (model.config.vision_config.num_hidden_layers + 1) - 1
    return number


@torch.no_grad()
def build(
    model: Any, vocabulary: dict[str, int], split: Split, pictures: int, questions: int, layers: Sequence[int]
) -> TestSet:
    """See the first pictures of a split.

    Args:
        model: ``LlavaForConditionalGeneration`` of the test bed.
        vocabulary: number of every word.
        split: of the pictures.
        pictures: how many.
        questions: asked about every picture, at most.
        layers: that selectors read.
    """
    config, consumed = model.config, consumed_layer(model)
    size = Size(side=config.vision_config.image_size, patch=config.vision_config.patch_size)
    examples = [example(split, i, questions) for i in range(pictures)]
    taps = {*layers, consumed}
    outputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in taps}
    received, projected = [], []
    tower = model.model.vision_tower
    for start in range(0, pictures, _BATCH):
        some = examples[start : start + _BATCH]
        pixels = normalise([one.pixels for one in some], size.side).to(model.device, model.dtype)
        run = run_tower(tower, pixels, taps)
        for layer in taps:
            outputs[layer].append(run.outputs[layer][:, 1:])
        received.append(run.received_attention("auto")[:, 1:])
        projected.append(model.model.multi_modal_projector(outputs[consumed][-1]))
    seen = {layer: torch.cat(parts) for layer, parts in outputs.items()}
    return TestSet(
        split, examples, seen, consumed, torch.cat(received), torch.cat(projected), size, vocabulary
    )
