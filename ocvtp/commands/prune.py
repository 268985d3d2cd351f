"""``ocvtp prune``: ask a model about a photograph, with most of its image tokens left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from ocvtp.commands.dropped import Wishes
from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.loading import prepare
from ocvtp.commands.progress import busy, steps

if TYPE_CHECKING:
    import torch

_PLACEHOLDER = "<image>"
# LLaVA-1.5's own conversation format, for processors that carry no chat template.
_LLAVA_PROMPT = "USER: " + _PLACEHOLDER + "\n{prompt} ASSISTANT:"


@dataclass(frozen=True)
class PruneResult:
    """One answer and what it took.

    ``milliseconds`` sums ``vision tower``, ``pruner``, ``projector`` and ``prefill`` (the rest of the way
    to the first token) to ``time to first token``; ``decode`` is everything after it. ``mass`` is how many
    tokens each kept one stands for, itself among them; ``None`` where dropped ones are thrown away.
    """

    answer: str
    image_tokens_before: int
    image_tokens_after: int
    prompt_tokens_before: int
    prompt_tokens_after: int
    new_tokens: int
    milliseconds: dict[str, float]
    device: str
    dtype: str
    report: str
    mass: list[int] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run(
    image: Path,
    *,
    model: str,
    pruner: str | None,
    keep: float,
    prompt: str,
    max_new_tokens: int,
    device: str,
    dtype: str,
    positions: Literal["auto", "compact", "original"],
    layer: int | None,
    seed: int,
    refine: int,
    wishes: Wishes,
    console: Console,
) -> PruneResult:
    """Load, patch, answer, time. Progress goes to ``console``. ``None`` as ``pruner`` is the default rule."""
    from ocvtp.vlm.contracts.selector import DEFAULT_RULE

    if _PLACEHOLDER in prompt:
        raise UserError(f"leave {_PLACEHOLDER} out of --prompt: the image is put in front of it")
    ready = prepare(
        image,
        model=model,
        pruner=DEFAULT_RULE if pruner is None else pruner,
        keep=keep,
        device=device,
        dtype=dtype,
        layer=layer,
        seed=seed,
        refine=refine,
        wishes=wishes,
        console=console,
        positions=positions,
    )
    vlm, processor, report = ready.model, ready.processor, ready.report
    on, as_dtype = vlm.device, vlm.dtype
    with blamed_on_input(ValueError):
        inputs = processor(images=ready.picture, text=chat_prompt(processor, prompt), return_tensors="pt")
    inputs = inputs.to(on, as_dtype)
    if on.type != "cpu":  # the first run on a GPU pays for loading kernels
        with busy(console, "warming up"):
            vlm.generate(**inputs, max_new_tokens=1, do_sample=False)
    with steps(console, "answering", max_new_tokens) as step:
        output, short, milliseconds = timed_generate(vlm, inputs, max_new_tokens, step)
    before = inputs["input_ids"].shape[1]
    answer = processor.decode(output[0, before:], skip_special_tokens=True).strip()
    placeholders = int((inputs["input_ids"] == vlm.config.image_token_id).sum())
    return PruneResult(
        answer=answer,
        image_tokens_before=placeholders,
        image_tokens_after=placeholders - (before - short),
        prompt_tokens_before=before,
        prompt_tokens_after=short,
        new_tokens=output.shape[1] - before,
        milliseconds=milliseconds,
        device=str(on),
        dtype=str(as_dtype).removeprefix("torch."),
        report=str(report),
        mass=_mass(vlm, inputs) if report.merge != "off" or report.weigh else None,
    )


def _mass(model: Any, inputs: Any) -> list[int]:
    """How many tokens each kept one stands for. Runs the tower once more, after everything was timed."""
    from ocvtp.vlm import select
    from ocvtp.vlm.call.controller import controller_of

    found = select(model, **controller_of(model).of_images(inputs))
    assert found.mass is not None
    return [int(count) for count in found.mass.flatten().tolist()]


class _TokenClock:
    """A streamer that notes when the prompt and every token pass, and what comes next."""

    def __init__(self, device: torch.device, step: Callable[[str], None]) -> None:
        self._device = device
        self._step = step
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(self._now())
        self._step(f"token {len(self.times)}" if len(self.times) > 1 else "first token")

    def end(self) -> None:
        self.finished = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def timed_generate(
    model: Any, inputs: dict[str, Any], max_new_tokens: int, step: Callable[[str], None]
) -> tuple[torch.Tensor, int, dict[str, float]]:
    """Greedy answer of a patched model, tokens of the pruned prompt, and the milliseconds of every stage.

    ``step`` moves a bar.
    """
    from ocvtp.vlm import stage_times

    clock = _TokenClock(model.device, step)
    with stage_times(model) as stages:
        start = time.perf_counter()
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
        )
    first = (clock.times[1] - start) * 1e3  # times[0] is the prompt
    milliseconds = dict(stages)
    milliseconds["prefill"] = first - sum(stages.values())
    milliseconds["time to first token"] = first
    milliseconds["decode"] = (clock.finished - clock.times[1]) * 1e3
    ids = output.sequences
    fed = ids.shape[1] - inputs["input_ids"].shape[1] - 1  # the last new token is not in the cache
    return ids, output.past_key_values.get_seq_length() - fed, milliseconds


def show(result: PruneResult, console: Console) -> None:
    """The answer, then the figures, then what was patched."""
    console.print(result.answer, markup=False, highlight=False)
    console.print()
    console.print(
        f"image tokens {result.image_tokens_before} -> {result.image_tokens_after}, "
        f"prompt {result.prompt_tokens_before} -> {result.prompt_tokens_after}, "
        f"{result.new_tokens} new ({result.device}, {result.dtype})"
    )
    if result.mass is not None:
        least, most = min(result.mass), max(result.mass)
        console.print(f"a kept token stands for {least} to {most}, itself among them", highlight=False)
    table = Table("stage", "ms")
    table.columns[1].justify = "right"
    for stage, milliseconds in result.milliseconds.items():
        table.add_row(stage, f"{milliseconds:.1f}", style="bold" if stage == "time to first token" else None)
    console.print(table)
    console.print(result.report, markup=False, highlight=False)


def chat_prompt(processor: Any, prompt: str) -> str:
    """A user's words behind one image, in the model's conversation format."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text
    return _LLAVA_PROMPT.format(prompt=prompt)
