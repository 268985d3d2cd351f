"""How every logits processor and stopping criterion of transformers is built for a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.generation import logits_process, stopping_criteria

from tests.vlm.tiny_llava import VOCAB

END = 99
#: What the scripted model says without any processor: repeats, two of the prompt's last tokens, an end.
SAID = [30, 31, 30, 31, 7, 8, END, 32, 33, 34]


@dataclass(frozen=True)
class Asked:
    """The prompt that a processor is built for, as its user has it in hand.

    Attributes:
        ids: ``[B, length]``.
        model: the model that is asked.
        beams: of the call.
    """

    ids: torch.Tensor
    model: Any
    beams: int = 1

    @property
    def length(self) -> int:
        return self.ids.shape[1]


@dataclass(frozen=True)
class Entry:
    """One class.

    Attributes:
        build: makes one from :class:`Asked`.
        options: of ``generate``.
        changes: whether it changes what is said.
        beams: whether beam search may use it.
        state: what to compare of it afterwards.
    """

    build: Callable[[Any, Asked], Any]
    options: dict[str, Any] = field(default_factory=dict)
    changes: bool = True
    beams: bool = True
    state: Callable[[Any], Any] = lambda used: None


_SAMPLED: dict[str, Any] = {"do_sample": True}
_ENDS: dict[str, Any] = {"eos_token_id": END}


def _counts_up(asked: Asked) -> Callable[[int, torch.Tensor], list[int]]:
    """A prefix function of the row, the length and the first token of the ids it is given."""

    def allowed(batch_id: int, ids: torch.Tensor) -> list[int]:
        first = int((ids != 0).nonzero()[0])
        return [40 + 10 * batch_id + len(ids) - asked.length, 70 + int(ids[first])]

    return allowed


def _timestamps() -> Any:
    return SimpleNamespace(
        no_timestamps_token_id=79,
        eos_token_id=END,
        bos_token_id=1,
        max_initial_timestamp_index=5,
        _detect_timestamp_from_logprob=True,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Every id a character."""
    made = Tokenizer(models.BPE({chr(ord("A") + i): i for i in range(VOCAB)}, []))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)


PROCESSORS: dict[str, Entry] = {
    "MinLengthLogitsProcessor": Entry(lambda c, a: c(a.length + 9, END), _ENDS),
    "MinNewTokensLengthLogitsProcessor": Entry(lambda c, a: c(a.length, 9, END), _ENDS),
    "TemperatureLogitsWarper": Entry(lambda c, a: c(50.0), _SAMPLED),
    "RepetitionPenaltyLogitsProcessor": Entry(lambda c, a: _ignoring(c, a)),
    "EncoderRepetitionPenaltyLogitsProcessor": Entry(lambda c, a: c(0.2, a.ids), beams=False),
    "TopPLogitsWarper": Entry(lambda c, a: c(0.01), _SAMPLED),
    "TopKLogitsWarper": Entry(lambda c, a: c(1), _SAMPLED),
    "TopHLogitsWarper": Entry(lambda c, a: c(0.05), _SAMPLED),
    "MinPLogitsWarper": Entry(lambda c, a: c(0.999), _SAMPLED),
    "TypicalLogitsWarper": Entry(lambda c, a: c(0.01), _SAMPLED),
    "EpsilonLogitsWarper": Entry(lambda c, a: c(0.5), _SAMPLED),
    "EtaLogitsWarper": Entry(lambda c, a: c(0.9), _SAMPLED),
    "NoRepeatNGramLogitsProcessor": Entry(lambda c, a: c(2)),
    "EncoderNoRepeatNGramLogitsProcessor": Entry(lambda c, a: c(2, a.ids)),
    "SequenceBiasLogitsProcessor": Entry(lambda c, a: c([[[8, 9, 30], -50.0], [[31], -50.0]])),
    "NoBadWordsLogitsProcessor": Entry(lambda c, a: c([[9, 30], [30, 31]])),
    "PrefixConstrainedLogitsProcessor": Entry(lambda c, a: c(_counts_up(a), a.beams)),
    "ForcedBOSTokenLogitsProcessor": Entry(lambda c, a: c(50), changes=False),
    "ForcedEOSTokenLogitsProcessor": Entry(lambda c, a: c(a.length + 4, END)),
    "InfNanRemoveLogitsProcessor": Entry(lambda c, a: c(), changes=False),
    "ExponentialDecayLengthPenalty": Entry(lambda c, a: c((2, 3.0), END, a.length)),
    "LogitNormalization": Entry(lambda c, a: c(), changes=False),
    "SuppressTokensAtBeginLogitsProcessor": Entry(lambda c, a: c([30], a.length)),
    "SuppressTokensLogitsProcessor": Entry(lambda c, a: c([31])),
    "WhisperTimeStampLogitsProcessor": Entry(lambda c, a: c(_timestamps(), begin_index=a.length)),
    "WhisperNoSpeechDetection": Entry(
        lambda c, a: _begun(c(33, 1), a.length), changes=False, state=lambda used: used.no_speech_prob
    ),
    "AlternatingCodebooksLogitsProcessor": Entry(lambda c, a: c(a.length, 40, 20)),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": Entry(lambda c, a: c(3.0, a.model)),
    "BarkEosPrioritizerLogitsProcessor": Entry(lambda c, a: c(END, 1e-6)),
    "WatermarkLogitsProcessor": Entry(lambda c, a: c(VOCAB, "cpu", bias=20.0)),
    "SynthIDTextWatermarkLogitsProcessor": Entry(
        lambda c, a: c(3, [654, 400, 836, 123], 2**10, 0, 16, torch.device("cpu")), _SAMPLED
    ),
    "DiaEOSChannelFilterLogitsProcessor": Entry(lambda c, a: c(1, 31)),
    "DiaEOSDelayPatternLogitsProcessor": Entry(lambda c, a: c([0], END, a.length + 4)),
}

CRITERIA: dict[str, Entry] = {
    "MaxLengthCriteria": Entry(lambda c, a: c(a.length + 3)),
    "MaxTimeCriteria": Entry(lambda c, a: c(1.0, initial_timestamp=0.0)),
    "StopStringCriteria": Entry(lambda c, a: c(tokenizer(), [chr(ord("A") + 30) + chr(ord("A") + 31)])),
    "EosTokenCriteria": Entry(lambda c, a: c(31)),
    "ConfidenceCriteria": Entry(
        lambda c, a: c(0.9), {"return_dict_in_generate": True, "output_scores": True}, beams=False
    ),
}

#: Processors that no call of ``generate`` of these models can use.
OTHERS = {
    "LogitsProcessor": "the base class",
    "StoppingCriteria": "the base class",
    "ClassifierFreeGuidanceLogitsProcessor": "wants scores of twice the rows, which MusicGen makes",
    "DiaClassifierFreeGuidanceLogitsProcessor": "wants scores of twice the rows, which Dia makes",
}


def _ignoring(cls: Any, asked: Asked) -> Any:
    """All but the last two tokens of the prompt: a tensor where the version takes one."""
    try:
        lengths = torch.full((asked.ids.shape[0] * asked.beams,), asked.length - 2)
        return cls(5.0, prompt_ignore_length=lengths)
    except ValueError:
        return cls(5.0, prompt_ignore_length=asked.length - 2)


def _begun(processor: Any, length: int) -> Any:
    processor.set_begin_index(length)
    return processor


def classes() -> dict[str, type]:
    """Every class of transformers' two modules, by name."""
    return {
        name: found
        for module, base in (
            (logits_process, logits_process.LogitsProcessor),
            (stopping_criteria, stopping_criteria.StoppingCriteria),
        )
        for name, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, base) and found.__module__ == module.__name__
    }
