"""Blocks about whole models: README's first table, end to end, stages, scaling, limits, FLOPs."""

from __future__ import annotations

from typing import Any

from bench.e2e.methods import OURS, UNPRUNED
from bench.e2e.presets import PRESETS
from bench.markdown import table
from bench.report.results import Result, Results
from ocvtp.vlm.encode.timing import STAGES

NOT_MEASURED = "not measured"
_GPU_PRESETS = [name for name, preset in PRESETS.items() if preset.gpu]


def find(result: Result, **wanted: Any) -> dict[str, Any] | None:
    """The first row with these values."""
    rows = result.data["rows"]
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), None)


def ours(result: Result) -> str:
    """The method of an end-to-end file that ran as ``ocvtp.apply`` does unless told."""
    return str(result.data.get("default", OURS))


def ratio(before: dict[str, Any], after: dict[str, Any], what: str = "ttft_ms") -> float:
    """How many times as fast, by medians."""
    return before[what]["median"] / after[what]["median"]


def headline(results: Results) -> str:
    """README's first table and what must be known of it."""
    head = ["one image, batch 1", "unpruned", "pruned", " "]
    lines, said = [], []
    small = results.one("e2e-cpu-small")
    if small is not None:
        first = {"mode": "eager", "batch": 1}
        before, after = (find(small, method=name, **first) for name in (UNPRUNED, ours(small)))
        assert before is not None
        assert after is not None
        tokens = f"{before['keep']} → {after['keep']} tokens"
        for name, what in (("language-model prefill", "prefill_ms"), ("time to first token", "ttft_ms")):
            pair = [f"{row[what]['median'] / 1e3:.2f} s" for row in (before, after)]
            lines.append([f"CPU, 0.5 B, {tokens}: {name}", *pair, f"**{ratio(before, after, what):.1f}x**"])
        billions = small.data["parameters"]["language"] / 1e9
        said.append(
            f"CPU rows: {small}; float32, LLaVA-1.5's vision tower, a language model of {billions:.2f} B "
            f"parameters, {before['text_tokens']} text tokens, by `python -m bench.e2e`; random weights "
            "(speed does not depend on them, answers do)."
        )
    for preset in ("llava-next-7b", "llava-1.5-7b"):
        gpus = [one for one in results.named(f"e2e-{preset}") if one.on_gpu]
        rows = [_first_token_row(one, preset) for one in gpus]
        lines += rows or [[f"GPU, {preset}: time to first token", NOT_MEASURED, NOT_MEASURED, ""]]
        said += [f"GPU rows: {one}; bfloat16, random weights." for one in gpus]
    pruner = results.one("pruner")
    if pruner is not None:
        row = pruner.data["rows"][0]
        said.append(
            f"The pruner alone takes {row['ocvtp']['median']:.0f} ms on that CPU, the published code's "
            f"dataflow {row['official']['median']:.0f} ms ({row['speedup']:.2f}x; at {pruner.commit})."
        )
    return "\n\n".join([table(head, lines), " ".join(said)])


def _first_token_row(result: Result, preset: str) -> list[str]:
    before, after = (find(result, method=name, mode="eager", batch=1) for name in (UNPRUNED, ours(result)))
    if before is None or after is None:
        return [f"GPU, {preset}: time to first token", NOT_MEASURED, NOT_MEASURED, ""]
    cells = [f"{row['ttft_ms']['median']:.1f} ms" for row in (before, after)]
    tokens = f"{before['keep']} → {after['keep']} tokens"
    return [
        f"{result.device}, {preset}, {tokens}: time to first token",
        *cells,
        f"**{ratio(before, after):.1f}x**",
    ]


def end_to_end(results: Results) -> str:
    """Every preset: all methods, modes, sizes."""
    head = ["device", "mode, B, text", "method", "image tokens", "first token, ms (p20 - p80)", "speed-up"]
    head += ["language model, ms", "tokens/s after it", "cache, MB", "peak, GB"]
    parts = []
    for preset in PRESETS:
        found = results.named(f"e2e-{preset}")
        lines = [line for result in found for line in _rows(result)]
        if preset in _GPU_PRESETS and not any(result.on_gpu for result in found):
            lines.append(["GPU", *[NOT_MEASURED] * 9])
        elif not lines:
            lines.append(["CPU", *[NOT_MEASURED] * 9])
        sources = "".join(f"\n\n{str(result)[0].upper()}{str(result)[1:]}." for result in found)
        parts.append(f"**{preset}**\n\n{table(head, lines)}{sources}")
    return "\n\n".join(parts)


def _rows(result: Result) -> list[list[str]]:
    lines = []
    for row in result.data["rows"]:
        same = {name: row[name] for name in ("mode", "batch", "text_tokens")}
        before = find(result, method=UNPRUNED, **same)
        prefill = row["prefill_ms"]
        rate = row["decode_tokens_per_s"]
        lines.append(
            [
                result.folder,
                f"{row['mode']}, {row['batch']}, {row['text_tokens']}",
                row["method"],
                str(row["keep"]),
                "{median:.0f} ({p20:.0f} - {p80:.0f})".format(**row["ttft_ms"]),
                f"{ratio(before, row):.2f}x" if before else "",
                f"{prefill['median']:.0f}" if prefill else "",
                f"{rate:.1f}" if rate else "",
                f"{row['kv_bytes'] / 1e6:.0f}",
                f"{row['peak_bytes'] / 1e9:.2f}",
            ]
        )
    return lines


def stages(results: Results) -> str:
    """Where the time to the first token goes, at batch 1, eagerly."""
    head = ["preset, device", "method", *(f"{stage}, ms" for stage in STAGES), "language model, ms"]
    lines = []
    for preset in PRESETS:
        found = results.named(f"e2e-{preset}")
        if preset in _GPU_PRESETS and not any(result.on_gpu for result in found):
            lines.append([f"{preset}, GPU", *[NOT_MEASURED] * 5])
        for result in found:
            for row in result.data["rows"]:
                if (row["mode"], row["batch"]) != ("eager", 1):
                    continue
                timings = [*(row["vision_ms"].get(stage) for stage in STAGES), row["prefill_ms"]]
                cells = [f"{timing['median']:.0f}" if timing else "" for timing in timings]
                lines.append([f"{preset}, {result.folder}", row["method"], *cells])
    return table(head, lines)


def scaling(results: Results) -> str:
    """Every curve: its ends and its exponents."""
    head = ["device", "what", "against", "from - to", "ms", "exponent: time", "memory", "FLOPs", "r²"]
    lines = []
    found = results.named("scaling")
    for result in found:
        for sweep in result.data["sweeps"]:
            first, last = sweep["points"][0], sweep["points"][-1]
            fits = [sweep["fits"][name] for name in ("ms", "peak_bytes", "flops")]
            lines.append(
                [
                    result.folder,
                    sweep["what"],
                    sweep["axis"],
                    f"{first['x']} - {last['x']}",
                    f"{first['ms']['median']:.1f} - {last['ms']['median']:.1f}",
                    *(f"{fit['exponent']:.2f}" if fit else "" for fit in fits),
                    f"{fits[0]['r2']:.3f}" if fits[0] else "",
                ]
            )
    if not any(result.on_gpu for result in found):
        lines.append(["GPU", *[NOT_MEASURED] * 8])
    return table(head, lines)


def limits(results: Results) -> str:
    """Where pruning pays little, nothing, or less."""
    head = ["device", "setting", "tokens", "unpruned, ms", "pruned, ms", "speed-up"]
    lines = []
    found = results.named("limits")
    for result in found:
        for row in result.data["rows"]:
            lines.append(
                [
                    result.folder,
                    row["what"],
                    f"{row['image_tokens']} → {row['keep']}",
                    f"{row['unpruned_ms']['median']:.0f}",
                    f"{row['pruned_ms']['median']:.0f}",
                    f"{row['speedup']:.2f}x",
                ]
            )
    if not any(result.on_gpu for result in found):
        lines.append(["GPU", *[NOT_MEASURED] * 5])
    return table(head, lines)


def flops(results: Results) -> str:
    """Published models by the paper's accounting and in full."""
    head = [
        "model",
        "tokens kept",
        "paper's accounting, TFLOP",
        "share",
        "to the first token, TFLOP",
        "share",
        "share, dropped tokens thrown away",
    ]
    head += ["pruner", "merging", "tower", "each further token"]
    result = results.one("flops")
    if result is None:
        return NOT_MEASURED
    lines = []
    for row in result.data["models"].values():
        paper, full = row["paper"], row["full"]
        before, after = full["unpruned"], full["pruned"]
        lines.append(
            [
                row["model"],
                f"{row['keep']} of {row['image_tokens']}",
                f"{paper['unpruned_tflops']:.2f} → {paper['pruned_tflops']:.2f}",
                f"{paper['ratio']:.1%}",
                f"{before['first_token']:.2f} → {after['first_token']:.2f}",
                f"{full['ratio']:.1%}",
                f"{full['thrown_away_ratio']:.1%}",
                f"{after['pruner']:.4f}",
                f"{after['merging']:.4f}",
                f"{after['vision_tower']:.2f}",
                f"{after['decode_step'] / before['decode_step']:.1%}",
            ]
        )
    return table(head, lines)


def by_method(results: Results) -> str:
    """The paper's Figure 3, time per image by method, and ours."""
    from bench.report.published import FIGURE_3

    head = ["device", "model", "method", "tokens", "time to first token, ms"]
    lines = [[one.device, one.model, one.method, str(one.tokens), f"{one.ms:.1f}"] for one in FIGURE_3]
    for preset in PRESETS:
        found = results.named(f"e2e-{preset}")
        if preset in _GPU_PRESETS and not any(result.on_gpu for result in found):
            lines.append(["GPU, ours", preset, *[NOT_MEASURED] * 3])
        for result in found:
            for row in result.data["rows"]:
                if (row["mode"], row["batch"]) == ("eager", 1):
                    ms = f"{row['ttft_ms']['median']:.1f}"
                    lines.append([f"{result.folder}, ours", preset, row["method"], str(row["keep"]), ms])
    return table(head, lines)
