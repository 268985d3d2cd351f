"""A run from beginning to end: that it learns, what it leaves behind, what stops it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ocvtp import OCPruner, PrunerConfig
from ocvtp.training import trainer as trainer_module
from ocvtp.training.checkpoint import STATE, ResumeError, read_progress
from ocvtp.training.log import METRICS, read_metrics
from ocvtp.training.step import Objective
from ocvtp.training.trainer import DivergedError, Trained, TrainingError, default_config, without_decoder
from tests.training.fake import RECIPE, Fake, run, small_config

LONGER = dataclasses.replace(RECIPE, epochs=12, warmup_epochs=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, run(out, recipe=LONGER)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of such short runs; ``trained`` is made before and has one."""
    monkeypatch.setattr(trainer_module, "plot_loss", lambda folder: True)


def test_it_learns(trained: tuple[Path, Trained]) -> None:
    rows = read_metrics(trained[0])
    held_out = [row["loss"] for row in rows if row["kind"] == "validation"]
    assert held_out[-1] < 0.75 * held_out[0]
    assert trained[1].best_loss == min(held_out)
    assert trained[1].best_epoch == held_out.index(min(held_out)) + 1


def test_rows_of_metrics(trained: tuple[Path, Trained]) -> None:
    rows = read_metrics(trained[0])
    training = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in training] == list(range(1, 8 * 12 + 1))
    assert all(row["epoch"] == (row["step"] - 1) // 8 + 1 for row in training)
    assert all(row["slots"] in LONGER.slots and row["gradient_norm"] > 0 for row in training)
    assert all(0 < row["live_slots"] <= 1 for row in training)
    assert all(row["images_per_second"] > 0 for row in training)
    rates = [row["learning_rate"] for row in training]
    assert max(rates) == rates[7] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-8)
    validation = [row for row in rows if row["kind"] == "validation"]
    assert [(row["epoch"], row["step"]) for row in validation] == [(i, 8 * i) for i in range(1, 13)]
    assert all(0 < row["live_slots"] <= 1 and 0 < row["distinct_picks"] <= 1 for row in validation)


def test_the_best_pruner_is_kept(trained: tuple[Path, Trained]) -> None:
    pruner = OCPruner.from_pretrained(trained[1].pruner)
    scale = Fake().x.double().var(dim=(0, 1), unbiased=False).mean().sqrt()
    assert pruner.config.feature_scale == pytest.approx(float(scale), rel=0.1)
    assert dataclasses.replace(pruner.config, feature_scale=1.0) == small_config(Fake())
    assert pruner(Fake().batch([0]), keep=4).indices.shape == (1, 4)
    assert not pruner.training


def test_plot_and_tensorboard(trained: tuple[Path, Trained]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (trained[0] / "loss.png").read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(trained[0] / "tensorboard"))
    board.Reload()
    rows = [row for row in read_metrics(trained[0]) if row["kind"] == "validation"]
    assert [event.step for event in board.Scalars("validation/loss")] == [row["step"] for row in rows]
    assert [event.value for event in board.Scalars("validation/loss")] == pytest.approx(
        [row["loss"] for row in rows]
    )


def test_a_finished_run_is_left_alone(trained: tuple[Path, Trained]) -> None:
    before = {file: file.read_bytes() for file in trained[0].rglob("*") if file.is_file()}
    again = run(trained[0], recipe=LONGER)
    assert again == dataclasses.replace(trained[1], resumed=trained[1].steps)
    assert {file: file.read_bytes() for file in trained[0].rglob("*") if file.is_file()} == before


def test_no_random_state_leaks(tmp_path: Path) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path / "run", recipe=dataclasses.replace(RECIPE, epochs=1))
    assert torch.equal(torch.rand(3), want)


def test_same_seed_same_bits_other_seed_others(tmp_path: Path) -> None:
    one = dataclasses.replace(RECIPE, epochs=1)
    results = []
    for name, recipe in (("a", one), ("b", one), ("c", dataclasses.replace(one, seed=1))):
        torch.manual_seed(len(results))
        results.append(run(tmp_path / name, recipe=recipe).best_loss)
    assert results[0] == results[1] != results[2]


def test_what_the_optimizer_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, clip=0.1, weight_decay=0.02)
    norms, settings = [], set()
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *arguments: object) -> object:
        (group,) = self.param_groups
        settings.add((len(group["params"]), group["weight_decay"], group["betas"], group["eps"]))
        norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    run(tmp_path / "run", recipe=recipe)
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert norms == pytest.approx([0.1] * 8, rel=1e-3)
    assert all(row["gradient_norm"] > 0.2 for row in rows)  # before clipping
    every = len(list(OCPruner(small_config(Fake())).parameters()))
    assert settings == {(every, 0.02, (0.9, 0.999), 1e-8)}


def test_validation_is_on_held_out_records_behind_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Fake()
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    masks: list[torch.Tensor] = []
    whole = Objective.forward

    def forward(self: Objective, features: torch.Tensor, noise: torch.Tensor, hidden: torch.Tensor) -> object:
        seen[self.training].append(features.half())
        if not self.training:
            assert not self.pruner.training
            masks.append(hidden)
        return whole(self, features, noise, hidden)

    monkeypatch.setattr(Objective, "forward", forward)
    run(tmp_path / "run", source)

    def photographs(batches: list[torch.Tensor]) -> set[str]:
        rows = torch.cat(batches)
        return {
            source.images[int((source.x == row).all(dim=(1, 2)).nonzero())]
            for row in torch.unique(rows, dim=0)
        }

    trained_on, held_out = photographs(seen[True]), photographs(seen[False])
    assert len(held_out) == 4
    assert trained_on.isdisjoint(held_out)
    assert all(mask.any(dim=1).all() for mask in masks)
    per_epoch = len(masks) // 3
    assert all(torch.equal(a, b) for a, b in zip(masks[:per_epoch], masks[per_epoch:], strict=False))


class TestEarlyStopping:
    def losses(self, monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
        given = iter(values)
        monkeypatch.setattr(
            trainer_module._Run,
            "_held_out_loss",
            lambda self, workers: {"loss": next(given), "live_slots": 1.0, "distinct_picks": 1.0},
        )

    def test_after_patience_epochs_without_improvement(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.losses(monkeypatch, [3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 0.5])
        recipe = dataclasses.replace(RECIPE, epochs=20, patience=2)
        done = run(tmp_path / "run", recipe=recipe)
        assert (done.finished, done.best_epoch, done.best_loss, done.steps) == ("early", 4, 1.0, 48)
        best = load_file(tmp_path / "run" / "pruner" / "model.safetensors")
        last = load_file(tmp_path / "run" / STATE)
        moved = [not torch.equal(last[f"parameter.pruner.{name}"], value) for name, value in best.items()]
        assert any(moved)  # what is kept is the best, not the last

    def test_a_run_to_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses(monkeypatch, [3.0, 2.0, 1.0])
        assert run(tmp_path / "run").finished == "all epochs"


class TestDivergence:
    def test_says_since_when_and_keeps_the_last_good_state(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = Objective.forward
        calls = 0

        def forward(self: Objective, *arguments: torch.Tensor) -> object:
            nonlocal calls
            made = whole(self, *arguments)
            calls += self.training
            return made._replace(loss=made.loss * math.nan) if calls == 5 and self.training else made

        monkeypatch.setattr(Objective, "forward", forward)
        with pytest.raises(DivergedError, match=r"NaN or infinite in step 5\. Kept are.* step 3.*lower"):
            run(tmp_path / "run")
        kept = load_file(tmp_path / "run" / STATE)
        assert all(value.isfinite().all() for value in kept.values())
        assert [row["loss"] is None for row in read_metrics(tmp_path / "run")] == [False] * 4 + [True] * 2
        monkeypatch.setattr(Objective, "forward", whole)  # say, other settings were not at fault
        assert run(tmp_path / "run").resumed == 3

    def test_infinite_features(self, tmp_path: Path) -> None:
        source = Fake()
        source.x[:] = torch.inf
        with pytest.raises(ValueError, match="standard deviation is nan"):
            run(tmp_path / "run", source)
        raw = dataclasses.replace(RECIPE, unit_variance=False)
        with pytest.raises(TrainingError, match=r"step 1: features of records \[.*hold NaN or Inf"):
            run(tmp_path / "run", source, raw)

    def test_validation_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        TestEarlyStopping().losses(monkeypatch, [3.0, math.nan])
        with pytest.raises(DivergedError, match="step 16"):
            run(tmp_path / "run")
        with safe_open(tmp_path / "run" / STATE, "pt") as file:
            assert '"step": 15' in file.metadata()["ocvtp"]


class TestRefused:
    @pytest.mark.parametrize(
        ("recipe", "match"),
        [
            ({"batch_size": 100}, "fewer than a batch of 100"),
            ({"slots": (4, 13)}, r"slots \[13\] are more than the 12 tokens"),
            ({"validation_share": 1.0}, "can't be split"),
        ],
    )
    def test_recipes_that_do_not_fit(self, tmp_path: Path, recipe: dict, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            run(tmp_path / "run", recipe=dataclasses.replace(RECIPE, **recipe))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            ({"in_dim": 32}, "in_dim is 32, the features' is 16"),
            ({"layer": 8}, "layer is 8, the features' is 3"),
            ({"decoder_tokens": 576}, "decoder_tokens is 576, the features' is 12"),
            ({"decoder_layers": 0}, "no decoder"),
        ],
    )
    def test_configs_that_do_not_fit(self, tmp_path: Path, config: dict, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            run(tmp_path / "run", config=small_config(Fake(), **config))

    def test_other_settings_in_the_same_folder(self, tmp_path: Path) -> None:
        run(tmp_path / "run", recipe=dataclasses.replace(RECIPE, epochs=1))
        with pytest.raises(ResumeError, match=r"recipe.epochs was 1, is 3"):
            run(tmp_path / "run")
        same = dataclasses.replace(RECIPE, epochs=1)
        with pytest.raises(ResumeError, match=r"features.fingerprint was"):
            run(tmp_path / "run", Fake(fingerprint="other"), same)
        with pytest.raises(ResumeError, match=r"features.training was"):
            run(tmp_path / "run", Fake(36), same)
        with pytest.raises(ResumeError, match=r"pruner.dropout was 0.01, is 0.0"):
            run(tmp_path / "run", recipe=same, config=small_config(Fake(), dropout=0.0))

    def test_a_folder_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(ResumeError, match="not empty and holds no run"):
            run(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_file_instead_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for out in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(ResumeError, match="file is a file; give a folder"):
                run(out)

    @pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
    def test_a_damaged_state(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / STATE).write_bytes(content)
        with pytest.raises(ResumeError, match=r"state.safetensors: it is no whole safetensors file.*--fresh"):
            run(tmp_path)

    def test_a_state_of_nobody(self, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / STATE)
        with pytest.raises(ResumeError, match="is not the state of a training run"):
            run(tmp_path)

    def test_validation_features_of_another_encoder_or_photograph(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="different encoders"):
            run(tmp_path / "run", validation=Fake(fingerprint="other"))
        with pytest.raises(ValueError, match="20 photographs are in both"):
            run(tmp_path / "run", validation=Fake())

    @pytest.mark.parametrize("option", ["log_every", "save_every"])
    def test_intervals(self, tmp_path: Path, option: str) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            run(tmp_path / "run", **{option: 0})


class TestFresh:
    def test_begins_anew_with_other_settings(self, tmp_path: Path) -> None:
        one = dataclasses.replace(RECIPE, epochs=1)
        run(tmp_path / "run", recipe=dataclasses.replace(one, seed=1))
        again = run(tmp_path / "run", recipe=one, fresh=True)
        assert (again.resumed, again.steps) == (0, 8)
        assert again.best_loss == run(tmp_path / "other", recipe=one).best_loss
        rows, others = (read_metrics(tmp_path / name) for name in ("run", "other"))
        assert [row["loss"] for row in rows] == [row["loss"] for row in others]

    def test_even_of_a_damaged_state(self, tmp_path: Path) -> None:
        (tmp_path / STATE).write_bytes(b"not safetensors at all")
        assert run(tmp_path, recipe=dataclasses.replace(RECIPE, epochs=1), fresh=True).steps == 8

    def test_takes_nothing_away_that_is_not_a_runs(self, tmp_path: Path) -> None:
        (tmp_path / "pruner").mkdir()
        (tmp_path / "pruner" / "model.safetensors").write_text("mine")
        with pytest.raises(ResumeError, match="not empty and holds no run"):
            run(tmp_path, fresh=True)
        assert (tmp_path / "pruner" / "model.safetensors").read_text() == "mine"


class TestUnreadableFeatures:
    class Broken(Fake):
        """Record 7 can't be read from some moment on."""

        reads = 0

        def batch(self, indices: Sequence[int]) -> torch.Tensor:
            self.reads += 1
            if self.reads > 8 and 7 in indices:
                raise OSError("record 7 is gone")
            return super().batch(indices)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_stop_training_and_it_can_be_taken_up(self, tmp_path: Path, workers: int) -> None:
        with pytest.raises(TrainingError, match=r"OSError: record 7 is gone"):
            run(tmp_path / "run", self.Broken(), workers=workers)
        done = run(tmp_path / "run")
        assert done.resumed > 0
        assert done.best_loss == run(tmp_path / "other").best_loss

    def test_of_held_out_images(self, tmp_path: Path) -> None:
        source = Fake()
        source.images = ["held out" if i == 0 else f"photo {i}" for i in range(40)]
        held = Fake(8)
        held.images = [f"other {i}" for i in range(8)]
        held.x[5] = torch.nan
        with pytest.raises(TrainingError, match=r"held-out images: features of records \[.*5.*NaN"):
            run(tmp_path / "run", source, validation=held)


def test_a_run_is_its_folders_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that dies before its first epoch is begun again, and another one is refused."""
    monkeypatch.setattr(trainer_module._Run, "_step", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        run(tmp_path / "run")
    monkeypatch.undo()
    state = read_progress(tmp_path / "run")
    assert state is not None
    assert (state.step, state.best_loss, state.versions["torch"]) == (0, None, torch.__version__)
    with pytest.raises(ResumeError, match=r"recipe.seed was 0, is 1"):
        run(tmp_path / "run", recipe=dataclasses.replace(RECIPE, seed=1))
    assert run(tmp_path / "run", recipe=RECIPE).resumed == 0


def test_states_are_saved_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    whole = trainer_module._Run._write_state

    def write(self: trainer_module._Run) -> None:
        whole(self)
        saved.append(read_progress(tmp_path / "run").step)
        assert (
            [row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
            == list(range(1, saved[-1] + 1))
            if saved[-1]
            else True
        )

    monkeypatch.setattr(trainer_module._Run, "_write_state", write)
    run(tmp_path / "run", recipe=dataclasses.replace(RECIPE, epochs=2), log_every=4, save_every=5)
    assert saved == [0, 5, 8, 10, 15, 16]


def test_what_lies_beside_the_pruner(trained: tuple[Path, Trained]) -> None:
    facts = json.loads((trained[1].pruner / "training.json").read_text())
    assert facts["recipe"] == LONGER.to_dict()
    assert facts["held_out_loss"] == trained[1].best_loss
    assert (facts["training_images"], facts["held_out_images"]) == (32, 8)
    assert facts["step"] == 8 * facts["epoch"] == 8 * trained[1].best_epoch


def test_without_its_decoder_a_pruner_keeps_the_same_tokens(trained: tuple[Path, Trained]) -> None:
    whole = OCPruner.from_pretrained(trained[1].pruner)
    torch.manual_seed(0)
    small = without_decoder(whole)
    assert torch.initial_seed() == 0
    assert small.decoder is None
    assert not small.training
    x = Fake().batch(range(4)).float()
    assert torch.equal(small(x, keep=4).indices, whole(x, keep=4).indices)
    assert small.slot_mean.data_ptr() != whole.slot_mean.data_ptr()


def test_workers_change_nothing(tmp_path: Path, trained: tuple[Path, Trained]) -> None:
    run(tmp_path / "run", recipe=LONGER, workers=2)
    one, other = (load_file(folder / STATE) for folder in (trained[0], tmp_path / "run"))
    assert all(value.equal(other[name]) for name, value in one.items())


def test_validation_features_of_their_own(tmp_path: Path) -> None:
    validation = Fake(12)
    validation.images = [f"other {i}" for i in range(12)]
    run(tmp_path / "run", recipe=dataclasses.replace(RECIPE, epochs=1), validation=validation)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 10  # all 40 records are trained on


def test_official_proportions_at_the_official_width() -> None:
    source = Fake()
    source.width, source.tokens, source.layer = 1024, 576, 8  # type: ignore[misc]
    assert default_config(source) == PrunerConfig(decoder_layers=4)


def test_bfloat16(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=2, autocast="bf16")
    done = run(tmp_path / "run", recipe=recipe)
    full = run(tmp_path / "full", recipe=dataclasses.replace(recipe, autocast="none"))
    assert done.best_loss == pytest.approx(full.best_loss, rel=0.02)
    assert done.best_loss != full.best_loss
    assert all(v.dtype == torch.float32 for v in load_file(tmp_path / "run" / STATE).values())


def test_features_of_any_scale_train_alike(tmp_path: Path) -> None:
    recipe, small = dataclasses.replace(RECIPE, epochs=2), Fake()
    small.x = (small.x.float() / 64).half()
    results = {
        name: run(tmp_path / name, source, chosen).best_loss
        for name, source, chosen in (
            ("usual", Fake(), recipe),
            ("small", small, recipe),
            ("raw", small, dataclasses.replace(recipe, unit_variance=False)),
        )
    }
    assert results["small"] == pytest.approx(
        results["usual"], rel=0.03
    )  # LayerNorm's epsilon tells them apart
    assert results["raw"] > 100 * results["small"] * float(small.x.float().var())
    pruner = OCPruner.from_pretrained(tmp_path / "small" / "pruner")
    error = (
        pruner.reconstruct(small.batch(range(4)).float(), 4).reconstruction - small.batch(range(4)).float()
    )
    assert error.square().mean() < 3 * small.x.float().var()  # in the features' own unit


def test_float16_with_a_scaled_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflowing step is left out and the scale halved; too many of them are told."""
    recipe = dataclasses.replace(RECIPE, epochs=1, autocast="fp16")
    done = run(tmp_path / "run", recipe=recipe)
    assert math.isfinite(done.best_loss)
    run(tmp_path / "full", recipe=dataclasses.replace(recipe, autocast="none"))
    norms = [
        [row["gradient_norm"] for row in read_metrics(tmp_path / name) if row["kind"] == "train"]
        for name in ("run", "full")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)  # the loss's scale is taken out before clipping
    start = read_progress(tmp_path / "run").scaler
    assert start["scale"] == 2.0**16
    assert start["_growth_tracker"] == 8  # no step overflowed
    whole = Objective.forward

    def forward(self: Objective, *arguments: torch.Tensor) -> object:
        made = whole(self, *arguments)
        return made._replace(loss=made.loss * 1e30) if self.training else made

    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr(trainer_module, "_MOST_SKIPPED", 6)
    with pytest.raises(DivergedError, match="float16 overflowed in 6 steps in a row, the last is step 6"):
        run(tmp_path / "other", recipe=recipe)
    after = read_progress(tmp_path / "other")
    assert (after.step, after.skipped, after.scaler["scale"]) == (3, 3, 2.0**13)
    other = load_file(tmp_path / "other" / STATE)
    assert not any(name.startswith("optimizer.") for name in other)  # no step was taken


def test_float16_may_overflow_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, steps = Objective.forward, 0

    def forward(self: Objective, *arguments: torch.Tensor) -> object:
        nonlocal steps
        made = whole(self, *arguments)
        steps += self.training
        return made._replace(loss=made.loss * 1e35) if self.training and steps % 2 else made

    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr(trainer_module, "_MOST_SKIPPED", 2)
    run(tmp_path / "run", recipe=dataclasses.replace(RECIPE, epochs=1, autocast="fp16"))
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert [row["gradient_norm"] is None for row in rows] == [True, False] * 4
    state = read_progress(tmp_path / "run")
    assert (state.skipped, state.scaler["scale"]) == (0, 2.0**12)


def test_full_backpropagation_trains(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, truncate=False)
    assert run(tmp_path / "run", recipe=recipe).best_loss > 0


def test_cut_off_metrics_are_read_to_the_last_whole_row(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"kind": "train", "step": 3, "loss": 1.0}\n{"kind": "tra')
    assert [row["step"] for row in read_metrics(tmp_path)] == [3]
