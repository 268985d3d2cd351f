"""Where a question meets a picture: in CLIP's joint space, or in the language model's own.

``LlavaForConditionalGeneration`` has CLIP's vision tower, but neither its text tower nor the projections
into the space that the two share. :class:`ClipText` brings them, from the checkpoint that the tower was taken
from.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ocvtp.vlm.contracts.evidence import Evidence
from ocvtp.vlm.contracts.weights import inside
from ocvtp_kernels._device import on_device

_copying = threading.Lock()

#: What chat templates put behind the question, and in front of it.
SUFFIXES = ("ASSISTANT:", "[/INST]", "<|eot_id|>", "<|im_end|>", "<|im_start|>assistant")
PREFIXES = ("<|vision_end|>", "</image>")


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

    The model is left as it is: where it computes in another precision or place, it is copied there once.

    Attributes:
        question: as given.
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
        self._model = model
        self._copies: dict[tuple[torch.device, torch.dtype], Any] = {}
        self._tokenizer = tokenizer
        self._decode = decode
        self.question = question
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
    def model(self) -> Any:
        """The checkpoint's model, as it was given."""
        return self._model

    @property
    def width(self) -> int:
        """Of the vision tower it belongs to."""
        return int(self._model.visual_projection.in_features)

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
        model = self._at(features.device, wide)
        with torch.no_grad():
            body = getattr(model.vision_model, "vision_model", model.vision_model)
            image = model.visual_projection(body.post_layernorm(features.to(wide)))
            if self.question is not None:
                segments = len(features) // evidence.tiles
                return Compared(image, [_embedded(model, self._pieces(self.question, pieces))] * segments)
            asked = [self._pieces(self._read(ids), pieces) for ids in _given(questions)]
            return Compared(image, [_embedded(model, ids) for ids in asked])

    def embed(self, question: str, *, pieces: bool) -> torch.Tensor:
        """``[M, E]`` of a question, where the model is; see :meth:`compare`."""
        model = self._at(self._model.device, torch.promote_types(self._model.dtype, torch.float32))
        with torch.no_grad():
            return _embedded(model, self._pieces(question, pieces))

    def _at(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model, or a copy of it, on a device and in a precision, out of training."""
        model = self._model
        if (model.device, model.dtype, model.training) == (device, dtype, False):
            return model
        with _copying:
            if (device, dtype) not in self._copies:
                self._copies[device, dtype] = copy.deepcopy(model).to(device=device, dtype=dtype).eval()
            return self._copies[device, dtype]

    def pieces(self, question: str) -> list[list[int]]:
        """Ids of a question, cut into pieces that each have their own start and end.

        CDPruner's code gives pieces none of their own, so that the first is pooled at its start, whatever the
        words: that is not repeated here.
        """
        most = self._most
        first, *words, last = self._tokenizer(question).input_ids
        starts = range(0, max(len(words), 1), most - 2)
        return [[first, *words[start : start + most - 2], last] for start in starts]

    def _pieces(self, question: str, every: bool) -> list[list[int]]:
        """All pieces, or the first, of at most as many ids as CLIP reads."""
        found = self.pieces(question)
        return found if every else found[:1]

    @property
    def _most(self) -> int:
        return int(self._model.config.text_config.max_position_embeddings)

    def _read(self, ids: torch.Tensor) -> str:
        if self._decode is None:
            raise ValueError("questions are given to ClipText, or read from prompts by decode=")
        text = self._decode(ids.tolist())
        ends = [place for suffix in self._suffixes if (place := text.find(suffix)) >= 0]
        text = text[: min(ends, default=len(text))].strip()
        for prefix in PREFIXES:
            text = text.removeprefix(prefix).strip()
        if not text:
            raise ValueError(
                "nothing follows the last picture of this prompt that could be a question: ask behind it, or "
                "give ClipText question="
            )
        return text


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
        device = (
            image.device if table.weight.is_meta else table.weight.device
        )  # offloaded: it comes when called
        texts = []
        with torch.no_grad():
            for ids in _given(questions):
                if not len(ids):
                    raise ValueError("this prompt has no words beside its pictures: there is no question")
                words = inside((self._model.get_decoder(),), table, on_device(ids, device))
                texts.append(-_unit(words.to(image.device, wide).mean(0, keepdim=True)))
        return Compared(_unit(image.to(wide)), texts)


def _given(questions: Sequence[torch.Tensor] | None) -> Sequence[torch.Tensor]:
    if questions is None:
        raise ValueError(
            "this method reads the question, and there is no prompt here: give ClipText question="
        )
    return questions


def _embedded(model: Any, pieces: Sequence[list[int]]) -> torch.Tensor:
    """``[M, E]`` of pieces of CLIP's ids, one by one: they differ in length."""
    made = []
    for ids in pieces:
        pooled = model.text_model(input_ids=on_device(torch.tensor([ids]), model.device)).pooler_output
        made.append(model.text_projection(pooled))
    return torch.cat(made)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)
