"""Methods that read the question: TRIM, CDPruner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ocvtp.methods import cdpruner, relevance_of, trim
from ocvtp.selection import Reduction, Selection
from ocvtp.vlm.contracts.evidence import Evidence
from ocvtp.vlm.contracts.reducer import Reducer, Site, adapted
from ocvtp.vlm.rivals.text import ClipText, LanguageText

#: What TRIM and CDPruner compare pictures with.
Text = ClipText | LanguageText | Literal["language_model"]
_ADAPTED = (
    "relevance is cosine similarity to the mean of the language model's embeddings of the question, as in "
    "OpenVINO's port"
)


@dataclass(frozen=True, eq=False)
class _Reader(Reducer):
    """What methods that read the question have in common.

    Attributes:
        text: a :class:`~ocvtp.vlm.rivals.text.ClipText` of the checkpoint that the tower was taken from, or
            ``"language_model"``, an adaptation that needs no other model. Default on Qwen2.5-VL: that one.
    """

    text: Text | None = None

    families = adapted(_ADAPTED)
    classless = _ADAPTED
    reads_text = True

    @property
    def reads_prompt(self) -> bool:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        return not isinstance(self.text, ClipText) or self.text.question is None

    def bound(self, site: Site) -> Reducer:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        text = self.text
        if text is None and self.behind:
            text = "language_model"
        if text is None:
            raise ValueError(
                f"{self.title} compares the picture with the question, for which this model has no text "
                f"tower: pass ocvtp.vlm.rivals.{type(self).__name__}(ClipText.load(CHECKPOINT, "
                "decode=processor.tokenizer.decode)) with the CLIP checkpoint that its vision tower was "
                'taken from (LLaVA-1.5: openai/clip-vit-large-patch14-336), or text="language_model", an '
                "adaptation"
            )
        if isinstance(text, ClipText):
            width = int(site.model.config.vision_config.hidden_size)
            if not site.class_token:
                raise ValueError(
                    "this model's vision tower is no CLIP, so no CLIP checkpoint shares a space with it: use "
                    'text="language_model"'
                )
            if text.width != width:
                raise ValueError(
                    f"this CLIP checkpoint belongs to a vision tower of width {text.width}, and this model's "
                    f"is {width} wide: give the one its tower was taken from"
                )
            return self
        if text != "language_model" and not isinstance(text, LanguageText):
            raise TypeError(f'text must be a ClipText or "language_model"; got {text!r}')
        made = LanguageText(site.model) if text == "language_model" else text
        return replace(self, text=made, adaptation=_ADAPTED)

    def compared(
        self, evidence: Evidence, questions: Sequence[torch.Tensor] | None, *, pieces: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """``[P, N, E]``, and per picture ``[M, E]``."""
        assert isinstance(self.text, ClipText | LanguageText)
        image, texts = self.text.compare(evidence, questions, pieces=pieces)
        return image, [text for text in texts for _ in range(evidence.tiles)]


@dataclass(frozen=True, eq=False)
class Trim(_Reader):
    """Tokens least similar to the question in CLIP's space, and the mean of all others (arXiv 2409.10994)."""

    name = "trim"
    title = "TRIM"
    source = "arXiv 2409.10994"
    merges = True

    def reduce(self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None) -> Reduction:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        image, texts = self.compared(evidence, questions, pieces=False)
        features = self.material(evidence)[:, int(evidence.class_token) :]
        return trim(features, image, torch.cat(texts), keep)


@dataclass(frozen=True, eq=False)
class CDPruner(_Reader):
    """Greedy MAP of a determinantal point process, conditioned on the question (arXiv 2506.10967)."""

    name = "cdpruner"
    title = "CDPruner"
    source = "arXiv 2506.10967"

    def reduce(self, evidence: Evidence, keep: int, questions: Sequence[torch.Tensor] | None) -> Selection:
        """See :class:`~ocvtp.vlm.contracts.reducer.Reducer`."""
        image, texts = self.compared(evidence, questions, pieces=True)
        pictures = [i // evidence.tiles for i in range(len(image))]
        relevance = relevance_of(image, texts, pictures=pictures)
        return cdpruner(evidence.projected(), relevance, keep)
