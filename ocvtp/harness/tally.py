"""Sums over answers, and the figures that are reported of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from ocvtp.harness.answering import Answer


@dataclass
class Tally:
    """Of some answers, of one process or several.

    Attributes:
        requests: questions, restored ones among them.
        restored: taken from an earlier run's journal, which also has what they cost.
        images: pictures and videos.
        vision_tokens: see :class:`~ocvtp.harness.answering.Answer`.
        kept_vision_tokens: see there.
        vision_tokens_in_layers: see there.
        output_tokens: see there.
        seconds: in ``generate``.
        preparing: in the processor, before it.
        warm_seconds: of batches that were not the first of a process.
        warm_images: in those.
        per_request: seconds of each question in them.
    """

    requests: int = 0
    restored: int = 0
    images: int = 0
    vision_tokens: int = 0
    kept_vision_tokens: int = 0
    vision_tokens_in_layers: float = 0.0
    output_tokens: int = 0
    seconds: float = 0.0
    preparing: float = 0.0
    warm_seconds: float = 0.0
    warm_images: int = 0
    per_request: list[float] = field(default_factory=list)

    def add(self, answer: Answer, *, restored: bool = False) -> None:
        """Count an answer."""
        self.requests += 1
        self.restored += restored
        self.images += answer.images
        self.vision_tokens += answer.vision_tokens
        self.kept_vision_tokens += answer.kept_vision_tokens
        self.vision_tokens_in_layers += answer.vision_tokens_in_layers
        self.output_tokens += answer.output_tokens
        self.seconds += answer.seconds
        self.preparing += answer.preparing
        if answer.warm:
            self.warm_seconds += answer.seconds
            self.warm_images += answer.images
            self.per_request.append(answer.seconds)

    @classmethod
    def of(cls, parts: Iterable[Tally]) -> Tally:
        """All of them together."""
        whole = cls()
        for part in parts:
            for name, value in vars(part).items():
                setattr(whole, name, getattr(whole, name) + value)
        return whole

    def figures(self) -> dict[str, int | float] | None:
        """JSON-ready; ``None`` where nothing was answered. What has no images has no figures per image.

        ``seconds_per_image`` is the time around ``generate`` with the device synchronised: vision tower,
        pruner, prefill and decoding, without decoding and resizing pictures, of batches after each process's
        first (of all, where there are no others). Of several processes it is each one's, not divided by them.
        """
        if not self.requests:
            return None
        found: dict[str, int | float] = {
            "requests": self.requests,
            "restored": self.restored,
            "images": self.images,
            "output_tokens": self.output_tokens,
            "preparing_seconds_per_request": self.preparing / self.requests,
            "median_seconds_per_request": statistics.median(
                self.per_request or [self.seconds / self.requests]
            ),
        }
        if self.images:
            warm = bool(self.warm_images)
            found |= {
                "vision_tokens_per_image": self.vision_tokens / self.images,
                "kept_vision_tokens_per_image": self.kept_vision_tokens / self.images,
                "vision_tokens_per_image_in_layers": self.vision_tokens_in_layers / self.images,
                "seconds_per_image": (
                    self.warm_seconds / self.warm_images if warm else self.seconds / self.images
                ),
            }
        return found
