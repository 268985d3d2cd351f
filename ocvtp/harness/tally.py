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
        timed: questions whose seconds are of this batch size and device; what follows is of them.
        seconds: in ``generate``.
        timed_tokens: that were generated.
        preparing: in the processor, before it.
        image_seconds: of questions with images.
        timed_images: in those.
        warm_seconds: of questions with images, in batches that were not the first of a process.
        warm_images: in those.
        per_request: seconds of each question in batches that were not the first.
    """

    requests: int = 0
    restored: int = 0
    images: int = 0
    vision_tokens: int = 0
    kept_vision_tokens: int = 0
    vision_tokens_in_layers: float = 0.0
    output_tokens: int = 0
    timed: int = 0
    seconds: float = 0.0
    timed_tokens: int = 0
    preparing: float = 0.0
    image_seconds: float = 0.0
    timed_images: int = 0
    warm_seconds: float = 0.0
    warm_images: int = 0
    per_request: list[float] = field(default_factory=list)

    def add(self, answer: Answer, *, restored: bool = False, timed: bool = True) -> None:
        """Count an answer.

        Args:
            answer: to be counted.
            restored: whether an earlier run gave it.
            timed: whether its seconds are of this run's batch size and device.
        """
        self.requests += 1
        self.restored += restored
        self.images += answer.images
        self.vision_tokens += answer.vision_tokens
        self.kept_vision_tokens += answer.kept_vision_tokens
        self.vision_tokens_in_layers += answer.vision_tokens_in_layers
        self.output_tokens += answer.output_tokens
        if not timed:
            return
        self.timed += 1
        self.seconds += answer.seconds
        self.timed_tokens += answer.output_tokens
        self.preparing += answer.preparing
        if answer.images:
            self.image_seconds += answer.seconds
            self.timed_images += answer.images
        if answer.warm:
            self.per_request.append(answer.seconds)
            if answer.images:
                self.warm_seconds += answer.seconds
                self.warm_images += answer.images

    @classmethod
    def of(cls, parts: Iterable[Tally]) -> Tally:
        """All of them together."""
        whole = cls()
        for part in parts:
            for name, value in vars(part).items():
                setattr(whole, name, getattr(whole, name) + value)
        return whole

    def figures(self) -> dict[str, int | float] | None:
        """JSON-ready; ``None`` where nothing was answered. What there is nothing of has no figure.

        ``seconds_per_image`` is the time around ``generate`` with the device synchronised: vision tower,
        pruner, prefill and decoding, without decoding and resizing pictures, of questions with images in
        batches after each process's first (in all, where there are no others). Of several processes it is
        each one's, not divided by them.
        """
        if not self.requests:
            return None
        found: dict[str, int | float] = {
            "requests": self.requests,
            "restored": self.restored,
            "images": self.images,
            "output_tokens": self.output_tokens,
        }
        if self.images:
            found |= {
                "vision_tokens_per_image": self.vision_tokens / self.images,
                "kept_vision_tokens_per_image": self.kept_vision_tokens / self.images,
                "vision_tokens_per_image_in_layers": self.vision_tokens_in_layers / self.images,
            }
        if self.timed:
            every = self.per_request or [self.seconds / self.timed]
            found |= {
                "timed_requests": self.timed,
                "median_seconds_per_request": statistics.median(every),
                "preparing_seconds_per_request": self.preparing / self.timed,
            }
        if self.warm_images:
            found["seconds_per_image"] = self.warm_seconds / self.warm_images
        elif self.timed_images:
            found["seconds_per_image"] = self.image_seconds / self.timed_images
        return found
