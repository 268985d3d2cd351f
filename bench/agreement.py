"""How often a precision keeps the tokens float64 keeps, on photographs: ``python -m bench.agreement``.

Rounding moves attention by little, and a kept token only where two are nearly tied. How often that is
depends on the features, so random ones can't choose a default precision: this takes a real encoder's, and a
pruner that has learned to group them. A photograph is either trained on or measured, never both.

Needs folders that are not part of the package: a vision encoder in Hugging Face's layout and photographs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness import device_slug, provenance
from ocvtp import BackendUnavailableError, OCPruner, PrunerConfig, Selection, area_weighted_mse
from ocvtp_kernels._arch import interpreting

KEEPS = (16, 64, 128, 192)
#: Float32 in PyTorch keeps at least this share of what float64 keeps, or nothing is said of the others.
GATE = 0.999
#: One photograph in so many is measured; which, its content alone decides.
HELD_OUT = 3
FILL = "attention received in the encoder's last layer, mean over heads and queries, the class token's too"
_SUFFIXES = {".jpg", ".jpeg", ".png"}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_RESULTS = Path(__file__).parent / "results"
_TRAINING = "training.json"
_SEED = 0
_BATCH = 8
_LEARNING_RATE = 1e-3
_TRAINED_SLOTS = (16, 32, 64, 128)


# --------------------------------------------------------------------------------------------- photographs


@dataclass(frozen=True)
class Photograph:
    """A file, and the digest of its content, which decides its part and its crops."""

    path: Path
    digest: str

    @property
    def held_out(self) -> bool:
        """Whether it is measured and never trained on; other photographs and folder names don't matter."""
        return int(self.digest, 16) % HELD_OUT == 0

    def crops(self, size: int, count: int) -> list[Image.Image]:
        """The middle square, then random squares of at least half the shorter side; always the same ones."""
        image = Image.open(self.path).convert("RGB")
        width, height = image.size
        draw = random.Random(self.digest)
        side = min(width, height)
        boxes = [((width - side) // 2, (height - side) // 2, side)]
        while len(boxes) < count:
            side = draw.randint((min(width, height) + 1) // 2, min(width, height))
            boxes.append((draw.randint(0, width - side), draw.randint(0, height - side), side))
        return [
            image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
            for x, y, side in boxes[:count]
        ]


def find_photographs(folders: Iterable[Path]) -> list[Photograph]:
    """Every jpg and png below the folders, in the order of their digests; a copy counts once."""
    files = sorted(f for folder in folders for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES)
    found = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in files}
    return [Photograph(found[digest], digest) for digest in sorted(found)]


# ------------------------------------------------------------------------------------------------ features


class Features(NamedTuple):
    """What a pruner reads: patch tokens of one encoder layer, and fill scores."""

    tokens: torch.Tensor  # [B, N, C]
    received: torch.Tensor  # [B, N]

    def to(self, device: torch.device) -> Features:
        """On another device."""
        return Features(self.tokens.to(device), self.received.to(device))

    def some(self, count: int) -> Features:
        """At most ``count`` of the crops, spread over all."""
        step = max(1, -(-len(self.tokens) // count))
        return Features(self.tokens[::step], self.received[::step])


class Encoder:
    """A vision encoder that takes pixels and, for sizes other than its own, interpolates positions itself."""

    def __init__(self, folder: Path, layer: int) -> None:
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
        self.layer = layer
        self.name = folder.resolve().name
        self.width = int(self.model.config.hidden_size)
        settings = folder / "preprocessor_config.json"
        values = json.loads(settings.read_text()) if settings.exists() else _IMAGENET
        self._mean, self._std = (np.array(values[name], np.float32) for name in ("image_mean", "image_std"))

    def pixels(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """``[B, 3, size, size]``, normalised as the encoder was trained."""
        stacked = np.stack(
            [(np.asarray(image, np.float32) / 255 - self._mean) / self._std for image in images]
        )
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """Patch tokens of the layer, and what each receives in the last one."""
        out = self.model(pixels, output_hidden_states=True, output_attentions=True)
        patches = (pixels.shape[-1] // self.model.config.patch_size) ** 2
        # What comes before the patches is the class token and registers, as many as the encoder has.
        tokens = out.hidden_states[self.layer + 1][:, -patches:]
        received = out.attentions[-1].mean(dim=(1, 2))[:, -patches:]
        return Features(tokens.clone(), received.clone())

    def features(self, photographs: Iterable[Photograph], size: int, crops: int) -> Features:
        """Of all crops, those of a photograph in a row."""
        parts = [self(self.pixels(photograph.crops(size, crops))) for photograph in photographs]
        return Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------ training


def pruner_config(width: int, layer: int, tokens: int) -> PrunerConfig:
    """The official proportions at another width; of the decoder half the layers, to be done in minutes."""
    return PrunerConfig(
        in_dim=width,
        hidden_dim=2 * width,
        slot_dim=width // 2,
        ffn_dim=2 * width,
        layer=layer,
        decoder_layers=2,
        decoder_ffn_dim=4 * width,
        decoder_tokens=tokens,
    )


def hidden_tokens(batch: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """``[batch, tokens]`` bool: half the time a tenth stays visible, else any number but all."""
    few = torch.full((batch,), tokens // 10)
    some = torch.randint(0, tokens, (batch,), generator=generator)
    visible = torch.where(torch.rand(batch, generator=generator) < 0.5, some, few)
    rank = torch.rand(batch, tokens, generator=generator).argsort(dim=1).argsort(dim=1)
    return rank >= visible[:, None]


def warm_cosine(step: int, steps: int) -> float:
    """A tenth of the steps up, the rest down to zero along a cosine."""
    warm = max(1, steps // 10)
    return (
        (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))
    )


def train(pruner: OCPruner, tokens: torch.Tensor, steps: int) -> list[float]:
    """The published recipe, made short; the loss of every step. Leaves the pruner in eval mode."""
    draw = torch.Generator().manual_seed(_SEED)
    optimizer = torch.optim.AdamW(pruner.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(warm_cosine, steps=steps))
    losses = []
    pruner.train()
    for _ in range(steps):
        x = tokens[torch.randint(len(tokens), (_BATCH,), generator=draw)]
        slots = _TRAINED_SLOTS[int(torch.randint(len(_TRAINED_SLOTS), (), generator=draw))]
        noise = torch.randn(_BATCH, slots, pruner.config.slot_dim, generator=draw)
        mask = hidden_tokens(_BATCH, x.shape[1], draw)
        out = pruner.reconstruct(x, slots, noise=noise.to(x.device), mask=mask.to(x.device))
        loss = area_weighted_mse(out.reconstruction, x, out.slot_attention)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pruner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    pruner.eval()
    return losses


def train_and_save(folder: Path, layer: int, tokens: torch.Tensor, steps: int, photographs: int) -> None:
    """Train a pruner on ``tokens`` ``[B, N, C]`` of so many photographs; save it and how it was trained."""
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)  # initial parameters and dropout
        pruner = OCPruner(pruner_config(tokens.shape[2], layer, tokens.shape[1])).to(tokens.device)
        losses = train(pruner, tokens, steps)
    last = losses[-max(1, steps // 10) :]
    training = {
        "steps": steps,
        "batch": _BATCH,
        "seed": _SEED,
        "photographs": photographs,
        "crops": len(tokens),
        "tokens": tokens.shape[1],
        "first_loss": losses[0],
        "final_loss": sum(last) / len(last),
        "feature_variance": tokens.var(dim=(0, 1)).mean().item(),
        "seconds": round(time.perf_counter() - start),
    }
    pruner.save_pretrained(folder)
    (folder / _TRAINING).write_text(json.dumps(training, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------- precisions


def nearest_tf32(x: torch.Tensor) -> torch.Tensor:
    """Float32 with 10 bits of mantissa, to nearest, ties away from zero as ``cvt.rna.tf32``."""
    bits = x.contiguous().view(torch.int32) + 0x1000
    return torch.where(x.isfinite(), (bits & ~0x1FFF).view(torch.float32), x)


def truncated_tf32(x: torch.Tensor) -> torch.Tensor:
    """Float32 whose last 13 bits a tensor core does not read: what is not converted is cut off."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def nearest(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rounds to the nearest of a dtype, ties to even."""
    return lambda x: x.to(dtype).to(torch.float32)


#: Triton's "tf32" converts nothing on NVIDIA, so the second row is the one to expect of it there.
ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tf32 rounding": nearest_tf32,
    "tf32 truncation": truncated_tf32,
    "fp16 rounding": nearest(torch.float16),
    "bf16 rounding": nearest(torch.bfloat16),
}


_FACTORS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.baddbmm.default: (1, 2),
}


class RoundedProducts(TorchDispatchMode):
    """Rounds both operands of every float32 matrix product below it; sums stay float32.

    Whatever the folded path is, its products end here, so that this can't grow apart from it. A product with
    a vector stays exact, as in the kernels.
    """

    def __init__(self, rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.products = 0
        self._rounding = rounding

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        factors = _FACTORS.get(func, ())
        if factors and args[factors[0]].dtype == torch.float32:
            self.products += 1
            args = tuple(self._rounding(x) if i in factors else x for i, x in enumerate(args))
        return func(*args, **(kwargs or {}))


Run = Callable[[OCPruner, Features, int], Selection]


def direct(pruner: OCPruner, x: Features, keep: int, *, backend: str, precision: str) -> Selection:
    """As anybody calls it, the attention map returned too."""
    if backend == "triton" and precision == "tf32" and interpreting():
        raise BackendUnavailableError("Triton's interpreter does not round TF32 operands: a GPU must say")
    return pruner(
        x.tokens,
        keep,
        x.received,
        seed=_SEED,
        backend=backend,
        precision=precision,
        return_attention=True,
    )


def emulated(
    pruner: OCPruner, x: Features, keep: int, *, rounding: Callable[[torch.Tensor], torch.Tensor]
) -> Selection:
    """PyTorch in float32, operands rounded; weights are folded before, exactly, as for the kernels."""
    plan = pruner.prepare(
        x.tokens, keep, seed=_SEED, backend="torch", precision="fp32", return_attention=True
    )
    with RoundedProducts(rounding) as mode:
        selection = plan.run(x.tokens).finish(x.received)
    if not mode.products:
        raise RuntimeError("the folded path multiplies with operations that this emulation does not know")
    return selection


TORCH = "float32 torch"
RUNS: dict[str, Run] = {
    TORCH: functools.partial(direct, backend="torch", precision="fp32"),
    **{
        f"Triton {precision}": functools.partial(direct, backend="triton", precision=precision)
        for precision in ("fp32", "tf32", "fp16")
    },
    **{
        f"{name} (emulated)": functools.partial(emulated, rounding=rounding)
        for name, rounding in ROUNDINGS.items()
    },
}


# ------------------------------------------------------------------------------------------------ agreement


@dataclass(frozen=True)
class Row:
    """One precision at one budget against float64.

    Attributes:
        precision: its name.
        keep: K, the budget and the number of slots.
        tokens: N.
        crops: compared.
        kept: share of kept tokens that float64 keeps too.
        identical: share of crops whose kept tokens are all the same.
        worst: ``kept`` of the worst crop.
        top: share of slots whose top token is the same, before duplicates go and the budget is filled.
        error: relative, of the attention maps, all crops together.
    """

    precision: str
    keep: int
    tokens: int
    crops: int
    kept: float
    identical: float
    worst: float
    top: float
    error: float


def compare(precision: str, got: Selection, want: Selection) -> Row:
    """``want`` is float64's."""
    assert got.slot_attention is not None
    assert want.slot_attention is not None
    _, keep = want.indices.shape
    crops, _, tokens = want.slot_attention.shape
    shared = (got.indices[:, :, None] == want.indices[:, None, :]).any(dim=2).double().mean(dim=1)
    attention = got.slot_attention.double()
    top = attention.argmax(dim=2) == want.slot_attention.argmax(dim=2)
    error = (attention - want.slot_attention).norm() / want.slot_attention.norm()
    return Row(
        precision,
        keep,
        tokens,
        crops,
        kept=shared.mean().item(),
        identical=(shared == 1).double().mean().item(),
        worst=shared.min().item(),
        top=top.double().mean().item(),
        error=error.item(),
    )


class Measured(NamedTuple):
    """What one size of image gave."""

    rows: list[Row]
    skipped: dict[str, str]  # a precision that can't run here -> why
    from_slots: dict[int, float]  # budget -> mean of its tokens that are some slot's own choice


def measure(pruner: OCPruner, features: Features, kernel_crops: int) -> Measured:
    """Every precision at every budget that drops at least half of the tokens.

    Raises:
        SystemExit: float32 in PyTorch does not agree.
    """
    exact = copy.deepcopy(pruner).double()
    measured = Measured([], {}, {})
    for keep in (keep for keep in KEEPS if 2 * keep <= features.tokens.shape[1]):
        oracle = functools.partial(direct, exact, keep=keep, backend="torch", precision="auto")
        all_exact = oracle(Features(features.tokens.double(), features.received))
        measured.from_slots[keep] = all_exact.from_slots.double().mean().item()
        for precision, run in RUNS.items():
            few = precision.startswith("Triton") and features.tokens.device.type == "cpu"
            part = features.some(kernel_crops) if few else features
            want = oracle(Features(part.tokens.double(), part.received)) if few else all_exact
            try:
                row = compare(precision, run(pruner, part, keep), want)
            except (BackendUnavailableError, ValueError) as error:
                measured.skipped[precision] = str(error)
                continue
            if precision == TORCH and row.kept < GATE:
                raise SystemExit(f"gate failed at {keep} of {row.tokens}: {TORCH} agrees on {row.kept:.3%}")
            measured.rows.append(row)
    return measured


def markdown(rows: Sequence[Row]) -> str:
    """A table of them."""
    head = (
        "precision",
        "K of N",
        "crops",
        "kept tokens equal",
        "identical crops",
        "worst crop",
        "top tokens equal",
        "attention error",
    )
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.precision,
        f"{row.keep} of {row.tokens}",
        str(row.crops),
        *(f"{100 * share:.2f} %" for share in (row.kept, row.identical, row.worst, row.top)),
        f"{row.error:.1e}",
    )


# ------------------------------------------------------------------------------------------------- command


def split(photographs: Iterable[Photograph]) -> tuple[list[Photograph], list[Photograph]]:
    """Those to train on and those to measure.

    Raises:
        SystemExit: one of them would be empty.
    """
    parts: tuple[list[Photograph], list[Photograph]] = ([], [])
    for photograph in photographs:
        parts[photograph.held_out].append(photograph)
    if not all(parts):
        raise SystemExit(
            f"{len(parts[0])} photographs to train on and {len(parts[1])} to measure; need more images"
        )
    return parts


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a pruner unless there is one, measure it, print; what a record holds.

    Raises:
        SystemExit: too few photographs, another encoder's pruner, or a failed gate.
    """
    encoder = Encoder(arguments.encoder, arguments.layer)
    trained_on, held_out = split(find_photographs(arguments.images))
    device = torch.device(arguments.device)
    if not any(arguments.pruner.glob("*")):
        features = encoder.features(trained_on, arguments.size[0], arguments.crops)
        tokens = features.tokens.to(device)
        train_and_save(arguments.pruner, encoder.layer, tokens, arguments.train_steps, len(trained_on))
    pruner = OCPruner.from_pretrained(arguments.pruner, map_location=device)
    if (pruner.config.in_dim, pruner.config.layer) != (encoder.width, encoder.layer):
        raise SystemExit(
            f"the pruner reads layer {pruner.config.layer}, {pruner.config.in_dim} wide; "
            f"the features are of layer {encoder.layer}, {encoder.width} wide"
        )
    notes = arguments.pruner / _TRAINING
    result: dict[str, Any] = {
        **provenance(device, arguments.commit),
        "interpreted": interpreting(),
        "encoder": encoder.name,
        "layer": encoder.layer,
        "fill": FILL,
        "held_out": len(held_out),
        "pruner": pruner.config.to_dict(),
        "training": json.loads(notes.read_text()) if notes.exists() else None,
        "sizes": [],
    }
    print(_summary(result))
    for size in arguments.size:
        measured = measure(
            pruner, encoder.features(held_out, size, arguments.crops).to(device), arguments.kernel_crops
        )
        _print(size, measured)
        rows = [asdict(row) for row in measured.rows]
        result["sizes"].append({"pixels": size, **measured._asdict(), "rows": rows})
    return result


def _summary(result: dict[str, Any]) -> str:
    training = result["training"]
    how = "not by this command"
    if training is not None:
        how = (
            f"{training['steps']} steps of {training['batch']} on {training['photographs']} photographs, "
            f"{training['crops']} crops of {training['tokens']} tokens; loss {training['first_loss']:.3f} -> "
            f"{training['final_loss']:.3f}, variance of the features {training['feature_variance']:.3f}"
        )
    return (
        f"Encoder: {result['encoder']}, layer {result['layer']}. Fill scores: {result['fill']}.\n"
        f"Training: {how}.\nMeasured: {result['held_out']} photographs held out."
    )


def _print(size: int, measured: Measured) -> None:
    print(f"\n{size} pixels, against float64:\n\n{markdown(measured.rows)}\n")
    chosen = ", ".join(f"{mean:.1f} of {keep}" for keep, mean in measured.from_slots.items())
    print(f"Kept tokens that are a slot's own choice, the rest is fill: {chosen}.")
    for precision, reason in measured.skipped.items():
        print(f"No row for {precision}: {reason}.")


def _write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agreement.json").write_text(json.dumps(result, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print Markdown, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a vision encoder")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders of photographs")
    parser.add_argument("--pruner", type=Path, required=True, help="its folder; trained if there is none")
    parser.add_argument("--layer", type=int, default=8, help="encoder layer it reads, from 0; default: 8")
    parser.add_argument("--size", type=int, nargs="+", default=[224], help="pixels; trained at the first")
    parser.add_argument("--crops", type=int, default=8, help="of each photograph; default: 8")
    parser.add_argument("--train-steps", type=int, default=400)
    parser.add_argument("--kernel-crops", type=int, default=8, help="for kernels on a CPU, which are slow")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--commit", help="of this tree, where git can't tell")
    parser.add_argument("--record", action="store_true", help="keep the figures")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="where; default: bench/results")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = run(arguments)
    if arguments.record:
        _write(result, arguments.results / device_slug(torch.device(arguments.device)))


if __name__ == "__main__":
    main()
