"""The report: what it reads, what it writes, and what it catches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.report import __main__ as command
from bench.report import accuracy, documents, kernels, models, pictures, serving
from bench.report.documents import ALLOWED, CHECKED, ROOT, faults, typed_by_hand
from bench.report.models import NOT_MEASURED
from bench.report.results import BadResultError, Result, Results, load

HEAD = {
    "date": "2026-11-24T10:00:00+00:00",
    "commit": "0123456789ab",
    "device": "NVIDIA H100 80GB HBM3",
    "cores": 16,
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "triton": "3.6.0",
    "driver": "580.1",
}


def timing(ms: float) -> dict[str, float]:
    return {"median": ms, "p20": 0.9 * ms, "p80": 1.1 * ms, "calls": 5}


def row(method: str, ms: float, **changes: Any) -> dict[str, Any]:
    return {
        "method": method,
        "mode": "eager",
        "batch": 1,
        "text_tokens": 32,
        "keep": 2880 if method == "unpruned" else 160,
        "prompt_tokens": 2912,
        "ttft_ms": timing(ms),
        "prefill_ms": timing(0.8 * ms),
        "decode_tokens_per_s": 50.0,
        "vision_ms": {"vision tower": timing(0.1 * ms)},
        "peak_bytes": 20 * 10**9,
        "kv_bytes": 10**9,
        **changes,
    }


def e2e(preset: str, *rows: dict[str, Any], folder: str = "h100", **changes: Any) -> Result:
    data = {**HEAD, "preset": preset, "parameters": {"language": 5.4e8}, "rows": list(rows), **changes}
    return Result(folder, f"e2e-{preset}", data)


# ------------------------------------------------------------------------------------------------- reading


def put(folder: Path, name: str, data: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def test_files_and_their_parts_are_read(tmp_path: Path) -> None:
    put(tmp_path, "h100/pruner.json", {**HEAD, "rows": []})
    put(tmp_path, "h100/tower.json", {"clip": {**HEAD, "rows": [1]}, "qwen": {**HEAD, "rows": [2]}})
    put(tmp_path, "counts/flops.json", {"date": "2026-11-24", "commit": "abc", "models": {}})
    results = load(tmp_path)
    assert sorted(one.name for one in results.all) == ["flops", "pruner", "tower clip", "tower qwen"]
    assert [one.on_gpu for one in results.all] == [False, True, True, True]
    assert results.one("tower qwen") is not None
    assert results.one("nothing") is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "h100/x.json is no JSON"),
        ({"rows": [], "commit": "abc", "date": "2026"}, r"h100/x.json \(x\) does not tell device"),
        ({"rows": []}, r"does not tell commit, date, device"),
        ("[]", "does not tell commit"),
    ],
)
def test_a_file_must_tell_where_it_is_from(tmp_path: Path, data: Any, message: str) -> None:
    put(tmp_path, "h100/x.json", data)
    with pytest.raises(BadResultError, match=message):
        load(tmp_path)
    with pytest.raises(SystemExit, match=message):
        command.main(["--check", "--results", str(tmp_path)])


def test_changes_that_are_in_no_commit_are_marked() -> None:
    clean, dirty = (Result("h100", "x", {**HEAD, "commit": c}) for c in ("0123456789ab", "0123456-dirty"))
    assert "uncommitted" not in str(clean)
    assert "measured at 01234567 on 2026-11-24, NVIDIA H100" in str(clean)
    assert "driver 580.1" in str(clean)
    assert "**(uncommitted changes)**" in str(dirty)
    assert "uncommitted changes" in kernels.files(Results([clean, dirty]))


# -------------------------------------------------------------------------------------------------- blocks


def test_nothing_measured_is_said_in_the_cells() -> None:
    nothing = Results([])
    for block in (
        models.headline,
        models.end_to_end,
        models.stages,
        models.scaling,
        models.limits,
        models.flops,
        models.by_method,
        kernels.floors,
        kernels.targets,
        serving.served,
    ):
        assert NOT_MEASURED in block(nothing)


def test_a_gpus_rows_take_the_place_of_nothing() -> None:
    found = Results([e2e("llava-next-7b", row("unpruned", 600.0), row("ocvtp", 80.0))])
    head = models.headline(found)
    assert "| NVIDIA H100 80GB HBM3, llava-next-7b, 2880 → 160 tokens: time to first token | 600.0 ms" in head
    assert "**7.5x**" in head
    assert "GPU, llava-1.5-7b: time to first token | not measured" in head
    assert "600 (540 - 660) | 1.00x" in models.end_to_end(found)
    assert "80 (72 - 88) | 7.50x" in models.end_to_end(found)
    assert "llava-next-7b, h100 | ocvtp | 8 |" in models.stages(found)
    lines = kernels.targets(found).splitlines()
    (target,) = (line for line in lines if "LLaVA-NeXT-7B" in line)
    assert target.endswith("| ≥ 6x | 7.500x | met |")
    slow = Results([e2e("llava-next-7b", row("unpruned", 600.0), row("ocvtp", 120.0))])
    assert "| ≥ 6x | 5.000x | **missed** |" in kernels.targets(slow)


def test_the_better_mode_counts_towards_a_target() -> None:
    captured = {"mode": "captured prefill", "batch": 8}
    found = e2e(
        "llava-1.5-7b",
        row("unpruned", 500.0, batch=8),
        row("ocvtp", 250.0, batch=8),
        row("unpruned", 400.0, **captured),
        row("ocvtp", 100.0, **captured),
    )
    assert "| ≥ 3x | 4.000x | met |" in kernels.targets(Results([found]))
    on_cpu = Result("cpu-x-2-cores", found.name, found.data)
    assert "| ≥ 3x | not measured" in kernels.targets(Results([on_cpu]))


def test_kernels_against_their_floors() -> None:
    ours = {
        "op": "pruner",
        "case": "llava-64",
        "shape": {"B": 1, "N": 576, "K": 64},
        "implementation": "ours fp16",
        "mode": "graph",
        "median_us": 75.0,
        "floor_us": 11.7,
        "floor_set_by": "flops",
        "percent_of_floor": 15.6,
        "speedup_over": {"official": 5.0},
    }
    found = Results([Result("h100", "micro-slot-attention", {**HEAD, "rows": [ours]})])
    table = kernels.floors(found)
    assert "| h100 | pruner | llava-64, B=1 | graph | 75.0 | 11.7 | flops | 16 % | 5.0x |" in table
    assert "| GPU | selection | not measured" in table
    assert "| ≤ 60 µs | 75.000 µs | **missed** |" in kernels.targets(found)
    data = pictures.kernels_data(found)
    assert list(data.values()) == [pytest.approx(75 / 11.7)]
    assert pictures.draw_kernels(data).axes


def spread(median: float) -> dict[str, float]:
    return {"median": median, "least": 0.9 * median, "most": 1.1 * median}


def server(name: str, clients: int, rate: float, prompt: int) -> dict[str, Any]:
    seconds = ("ttft_p50_s", "ttft_p95_s", "latency_p50_s", "cpu_s_per_request")
    return {
        "server": name,
        "concurrency": clients,
        "rounds": 3,
        "prompt_tokens": prompt,
        "requests_per_s": spread(rate),
        **{what: spread(1 / rate) for what in seconds},
        "peak_cache": spread(0.97),
        "peak_running": spread(11.0),
        "blocks_per_request": -(-prompt // 32),
        "requests_that_fit": 200 // -(-prompt // 32),
        "start_up_line": 7.09,
    }


def test_servers_by_clients() -> None:
    """Sorted by clients, gains over the unpruned server at as many; and what was served."""
    data = {
        **HEAD,
        "vllm": "0.33.0",
        "note": None,
        "image_tokens": 576,
        "keep": 64,
        "dtype": "bfloat16",
        "answer_tokens": 16,
        "options": "--dtype bfloat16",
        "parameters": {"vision": 3.2e8, "language": 6.7e9},
        "rows": [
            server(name, clients, rate, prompt)
            for clients, rates in ((16, (10.0, 25.0)), (1, (0.5, 1.0)))
            for name, rate, prompt in (("unpruned", rates[0], 602), ("ocvtp, pruner", rates[1], 90))
        ],
    }
    found = Result("h100", "serving-llava-1.5-7b", data)
    text = serving.served(Results([found]))
    lines = [line for line in text.splitlines() if line.startswith("| h100")]
    assert [line.split(" | ")[1] for line in lines[:4]] == ["1", "1", "16", "16"]
    assert "| ocvtp, pruner | 90 | 1.00 (0.900 - 1.10) | 2.00x |" in lines[1]
    assert "| 25.0 (22.5 - 27.5) | 2.50x | 0.0400 | 0.0400 | 0.0400 | 0.0400 | 97% | 11 |" in lines[3]
    assert [serving.three(value) for value in (1234.5, 99.0, 0.0123)] == ["1234", "99.0", "0.0123"]
    assert lines[4:] == [
        "| h100 | unpruned | 19 | 10 | 7.1x |",
        "| h100 | ocvtp, pruner | 3 | 66 | 7.1x |",
    ]
    assert "vllm 0.33.0" in text
    assert "320 M parameters on the vision side and 6700 M" in text
    assert "mean nothing" not in text
    assert text.count(f"| CPU | {NOT_MEASURED}") == 2  # the other preset
    rehearsal = Result("h100", found.name, {**data, "note": "a rehearsal: figures mean nothing"})
    assert "**A rehearsal: figures mean nothing.**" in serving.served(Results([rehearsal]))
    on_cpu = Result("cpu-x-2-cores", found.name, data)
    assert serving.served(Results([on_cpu])) == serving.served(Results([]))


def answered(method: str, right: float, percent: int = 100, **changes: Any) -> dict[str, Any]:
    about = {"method": method, "group": "", "mode": "plain", "split": "test", "percent": percent}
    return {**about, "accuracy": [right, right - 0.01, right + 0.01], **changes}


def test_right_answers_as_they_are_and_merged_and_weighted() -> None:
    """Trainings in one cell; and the commonest answers, where no model without pictures was asked."""
    trained = {"method": "ours, consumed layer", "percent": 5}
    rows = [
        answered("all tokens", 0.976),
        answered("words alone: the commonest answer", 0.308),
        answered("random", 0.5, 5),
        answered("random", 0.6, 5, mode="both"),
        answered("random", 0.1, 5, split="unseen"),
        *(
            answered(right=right, group=group, mode="both", **trained)
            for group, right in (("a", 0.9), ("b", 0.8))
        ),
    ]

    def made(*more: dict[str, Any]) -> str:
        return accuracy.answers(Results([Result("cpu", "accuracy", {**HEAD, "rows": [*rows, *more]})]))

    lines = {line.split(" | ")[0]: line for line in made().splitlines()}
    assert "| 50.0 ± 1.0 | 60.0 ± 1.0 |" in lines["| random"]
    assert "| 90.0 and 80.0 |" in lines["| pruner trained on the consumed layer, 2 trainings"]
    assert "All tokens: 97.6 ± 1.0; words alone: 30.8 ± 1.0." in made()
    assert "words alone: 32.2 ± 1.0." in made(answered("words alone: a model trained so", 0.322))


# -------------------------------------------------------------------------------------------- the documents


def test_committed_documents_are_what_the_results_make() -> None:
    """What CI checks: no figure in README or docs/performance.md that is not from a file of results."""
    assert faults(load()) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    for path in (ROOT / "docs").glob("*.*"):
        shutil.copy(path, tmp_path / "docs")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_figure_edited_by_hand_is_found(copy: Path) -> None:
    text = (copy / "README.md").read_text()
    figure = text.partition("<!-- headline -->")[2].partition("**")[2].partition("**")[0]
    assert figure.endswith("x")
    edit(copy / "README.md", f"**{figure}**", "**99.9x**")
    assert faults(load(), copy) == ["README.md: block 'headline' is not what the results make"]
    documents.renew(load(), copy)
    assert faults(load(), copy) == []
    assert (copy / "README.md").read_text() == text


@pytest.mark.parametrize("document", CHECKED)
def test_a_figure_outside_of_blocks_is_found(copy: Path, document: str) -> None:
    path = copy / document
    path.write_text(path.read_text() + "\nIt takes 12.3 ms, which is 4x as fast.\n")
    assert faults(load(), copy) == [
        f"{document}: {typed!r} is in no block" for typed in typed_by_hand(path.read_text())
    ]
    assert len(typed_by_hand(path.read_text())) == 2


def test_what_counts_as_a_figure() -> None:
    assert typed_by_hand("saves 21 % and 3.5 GB, 2x as fast") != []
    assert len(typed_by_hand("saves 21 % and 3.5 GB, 2x as fast")) == 3
    for free in (
        "Python 3.10",
        "at most 4 images",
        "`30 ms`",
        "```\n30 ms\n```",
        "<!-- a -->30 ms<!-- /a -->",
    ):
        assert typed_by_hand(free) == []
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert all(phrase in readme for phrase in ALLOWED)  # no allowance that nothing needs


def test_a_picture_of_other_results_is_found(copy: Path) -> None:
    results = load()
    picture = copy / "docs" / "performance-flops.png"
    changed = [
        Result(one.folder, one.name, json.loads(json.dumps(one.data))) if one.name == "flops" else one
        for one in results.all
    ]
    next(one for one in changed if one.name == "flops").data["models"]["llava-1.5-7b, keep 64"]["paper"][
        "pruned_tflops"
    ] = 0.5
    assert not pictures.is_current(picture.name, Results(changed), picture.parent)
    assert pictures.is_current(picture.name, results, picture.parent)
    picture.unlink()
    assert "docs/performance-flops.png was drawn from other results" in faults(results, copy)


def test_no_data_no_picture(tmp_path: Path) -> None:
    (tmp_path / "performance-budget.png").touch()
    assert not pictures.is_current("performance-budget.png", Results([]), tmp_path)
    pictures.draw("performance-budget.png", Results([]), tmp_path)
    assert pictures.is_current("performance-budget.png", Results([]), tmp_path)


def test_pictures_of_what_a_gpu_may_measure(tmp_path: Path) -> None:
    """Every picture draws, with rows as benchmarks write them."""
    sweeps = [
        {"what": f"time to first token, {who}", "axis": "kept tokens", "points": points}
        for who, points in (
            ("unpruned", [{"x": 16, "ms": timing(9.0)}, {"x": 64, "ms": timing(9.0)}]),
            ("ocvtp", [{"x": 16, "ms": timing(3.0)}, {"x": 64, "ms": timing(4.5)}]),
        )
    ]
    scaling = Result("h100", "scaling", {**HEAD, "models": "7b", "sweeps": sweeps})
    next_7b = e2e("llava-next-7b", row("unpruned", 600.0), row("ocvtp", 80.0))
    found = Results([*load().all, scaling, next_7b])
    assert pictures.budget_data(found)["h100, 7b model"] == [[16, 3.0], [64, 2.0]]
    assert pictures.time_data(found)["llava-next-7b\nh100"] == {"unpruned (2880)": 600.0, "ocvtp (160)": 80.0}
    for name in ("performance-budget.png", "performance-time.png", "performance-flops.png"):
        pictures.draw(name, found, tmp_path)
        assert pictures.is_current(name, found, tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--check"]) == 0
    data = {**e2e("llava-next-7b", row("unpruned", 600.0), row("ocvtp", 80.0)).data}
    put(tmp_path, "results/h100/e2e-llava-next-7b.json", data)
    given = ["--results", str(tmp_path / "results")]
    assert command.main([*given, "--check"]) == 1
    assert "README.md: block 'headline'" in capsys.readouterr().out
    assert command.main([*given, "--into", str(tmp_path / "made")]) == 0
    assert "**7.5x**" in (tmp_path / "made" / "README.md").read_text()
    assert command.main([*given, "--into", str(tmp_path / "made"), "--check"]) == 1  # copies afresh
