"""Where a question meets a picture: in CLIP's joint space, or in the language model's own.

``LlavaForConditionalGeneration`` has CLIP's vision tower, but neither its text tower nor the projections
into the space that the two share. :class:`ClipText` brings them, from the checkpoint that the tower was taken
from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ocvtp.vlm.contracts.evidence import Evidence

#: What chat templates put behind the question.
SUFFIXES = ("ASSISTANT:", "[/INST]", "<|im_start|>assistant")


class Compared(NamedTuple):
    """A question and a picture in one space.

    Attributes:
        image: ``[P, N, E]``.
        texts: per segment ``[M, E]``: the question, or its pieces.
    """

    image: torch.Tensor
    texts: list[torch.Tensor]


class ClipText:
    """The parts of a CLIP checkpoint that a VLM leaves out.

    Args:
        model: ``CLIPModel``, of the very checkpoint that the VLM's tower was taken from.
        tokenizer: its own: called with a string, has ``input_ids``.
        decode: ids of the VLM's language model to a string, say ``processor.tokenizer.decode``. Needed
            unless every question is given.
        question: what is asked about every picture, in the place of what the prompt says.
        suffixes: what ends the question in the prompt; the first that is found, and what follows it, is cut.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        decode: Callable[[Any], str] | None = None,
        question: str | None = None,
        suffixes: Sequence[str] = SUFFIXES,
    ) -> None:
        for name in ("text_model", "text_projection", "visual_projection", "vision_model"):
            if not hasattr(model, name):
                raise TypeError(f"model must be a CLIPModel; a {type(model).__name__} has no {name}")
        if decode is None and question is None:
            raise ValueError(
                "give decode=processor.tokenizer.decode, by which questions are read from prompts, or give "
                "question="
            )
        self.model = model.eval()
        self._tokenizer = tokenizer
        self._decode = decode
        self._question = question
        self._suffixes = tuple(suffixes)

    @classmethod
    def load(cls, checkpoint: str | Path, **options: Any) -> ClipText:
        """From a folder or a hub name, such as ``"openai/clip-vit-large-patch14-336"`` for LLaVA-1.5.

        Args:
            checkpoint: with weights as safetensors; nothing in it is executed.
            options: of :class:`ClipText`.

        Raises:
            OSError: there is none.
        """
        from transformers import CLIPModel, CLIPTokenizer

        model = CLIPModel.from_pretrained(checkpoint, use_safetensors=True)
        return cls(model, CLIPTokenizer.from_pretrained(checkpoint), **options)

    @property
    def width(self) -> int:
        """Of the vision tower it belongs to."""
        return int(self.model.visual_projection.in_features)

    def compare(
        self, evidence: Evidence, questions: Sequence[torch.Tensor] | None, *, pieces: bool
    ) -> Compared:
        """Pictures and questions in CLIP's space, at least float32.

        Args:
            evidence: of pictures.
            questions: ids of the language model, per segment; not needed where the question is given.
            pieces: whether a long question is cut into pieces, or ends at CLIP's 77 ids.

        Raises:
            ValueError: no question.
        """
        features = evidence.features()[:, int(evidence.class_token) :]
        wide = torch.promote_types(features.dtype, torch.float32)
        device = features.device
        self.model.to(device=device, dtype=wide)
        with torch.no_grad():
            body = getattr(self.model.vision_model, "vision_model", self.model.vision_model)
            image = self.model.visual_projection(body.post_layernorm(features.to(wide)))
            if self._question is not None:
                segments = len(features) // evidence.tiles
                return Compared(image, [self.embed(self._question, pieces=pieces)] * segments)
            return Compared(image, [self.embed(self._read(ids), pieces=pieces) for ids in _given(questions)])

    def embed(self, question: str, *, pieces: bool) -> torch.Tensor:
        """``[M, E]`` of a question; see :meth:`compare`."""
        ids = self.pieces(question) if pieces else [self._ids(question)]
        return torch.cat([self.embed_ids(torch.tensor([one])) for one in ids])

    def embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """``[M, n]`` ids of CLIP ``-> [M, E]``."""
        made: torch.Tensor
        with torch.no_grad():
            pooled = self.model.text_model(input_ids=ids.to(self.model.device)).pooler_output
            made = self.model.text_projection(pooled)
        return made

    def pieces(self, question: str) -> list[list[int]]:
        """Ids of a question, cut into pieces that each have their own start and end.

        CDPruner's code gives pieces none of their own, so that the first is pooled at its start, whatever the
        words: that is not repeated here.
        """
        most = self._most
        first, *words, last = self._tokenizer(question).input_ids
        starts = range(0, max(len(words), 1), most - 2)
        return [[first, *words[start : start + most - 2], last] for start in starts]

    @property
    def _most(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def _ids(self, question: str) -> list[int]:
        return self.pieces(question)[0]

    def _read(self, ids: torch.Tensor) -> str:
        if self._decode is None:
            raise ValueError("questions are given to ClipText, or read from prompts by decode=")
        text = self._decode(ids.tolist())
        ends = [place for suffix in self._suffixes if (place := text.find(suffix)) >= 0]
        return text[: min(ends, default=len(text))].strip()


class LanguageText:
    """The mean of the language model's embeddings of the question, beside what it reads of the picture.

    As in OpenVINO GenAI's port of CDPruner; an adaptation, for models that come without a text tower.

    Args:
        model: the ``...ForConditionalGeneration``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def compare(
        self, evidence: Evidence, questions: Sequence[torch.Tensor] | None, *, pieces: bool
    ) -> Compared:
        """See :meth:`ClipText.compare`; one piece. Normalised, and negated where CLIP's sign is expected.

        On CLIP's last layer but one, similarity runs against relevance, which the methods undo. Here it does
        not, so the text is negated.
        """
        image = evidence.projected()
        wide = torch.promote_types(image.dtype, torch.float32)
        table = self._model.get_input_embeddings()
        device = table.weight.device
        with torch.no_grad():
            texts = [
                -_unit(table(ids.to(device)).to(wide).mean(0, keepdim=True)).to(image.device)
                for ids in _given(questions)
            ]
        return Compared(_unit(image.to(wide)), texts)


def _given(questions: Sequence[torch.Tensor] | None) -> Sequence[torch.Tensor]:
    if questions is None:
        raise ValueError(
            "this method reads the question, and there is no prompt here: give ClipText question="
        )
    return questions


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)
