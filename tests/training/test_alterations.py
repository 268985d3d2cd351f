"""Whatever is done to a stored file: other results never, a traceback never. The same bits, or a refusal.

Tables of alterations (``tests/alterations.py``) go over every file of a feature store and of a training run
that was stopped half way. Each must end as if nothing had been done, or in an error that names the file, the
field where there is one, and what to do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ocvtp.stored.tensors import KEY
from ocvtp.training import trainer as trainer_module
from ocvtp.training.checkpoint import STATE, ResumeError, read_progress
from ocvtp.training.features import extract
from ocvtp.training.log import METRICS, read_metrics
from ocvtp.training.plot import PLOT
from ocvtp.training.store import INDEX, FeatureStore, StoreError
from tests.alterations import Alteration, harmless, of_bytes, of_json, of_values
from tests.training.fake import RECIPE, Fake, run
from tests.training.pictures import RECORD_BYTES, FakeEncoder, contents, good_pictures

Change = Callable[[Path], None]
TO_DO = re.compile(
    r"copy it back|ocvtp features|make the features again|give another|give an empty|move it away|--fresh"
)


def in_file(name: str, alterations: Iterator[Alteration]) -> Iterator[tuple[str, Change, Sequence[str]]]:
    """Name, what to do to a folder, and what a refusal must name, for each alteration of one of its files."""
    for alteration in alterations:

        def change(folder: Path, alteration: Alteration = alteration) -> None:
            (folder / name).write_bytes(alteration.apply((folder / name).read_bytes()))

        yield f"{name}: {alteration.name}", change, [name, alteration.field]


def of_places(name: str) -> Iterator[tuple[str, Change, Sequence[str]]]:
    """What can stand in a file's place."""

    def gone(folder: Path) -> None:
        (folder / name).unlink()

    def as_folder(folder: Path) -> None:
        gone(folder)
        (folder / name).mkdir()

    def as_link(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    def as_dangling_link(folder: Path) -> None:
        gone(folder)
        (folder / name).symlink_to(folder / "nowhere")

    def as_pipe(folder: Path) -> None:
        gone(folder)
        os.mkfifo(folder / name)

    changes = [gone, as_folder, as_link, as_dangling_link, *([as_pipe] if hasattr(os, "mkfifo") else [])]
    for change in changes:
        yield f"{name} {change.__name__}", change, [name]


def fields_of(name: str, values: dict[str, Any]) -> Iterator[tuple[str, Change, Sequence[str]]]:
    """Every place of a JSON file."""
    for what, altered, field in of_values(values):

        def change(folder: Path, altered: Any = altered) -> None:
            (folder / name).write_text(json.dumps(altered))

        yield f"{name}: {what}", change, [Path(name).name, field]


def tried(
    original: Path,
    alterations: Iterator[tuple[str, Change, Sequence[str]]],
    use: Callable[[Path], object],
    refusal: type[Exception],
    work: Path,
) -> tuple[int, int]:
    """Alterations that changed nothing, and those that were refused; fails with a list of all others."""
    want, wrong, same, refused = None, [], 0, 0
    untouched = work / "untouched" / original.name
    shutil.copytree(original, untouched)
    want = use(untouched)
    for what, change, named in alterations:
        shutil.rmtree(work / "altered", ignore_errors=True)
        (work / "elsewhere").unlink(missing_ok=True)
        folder = work / "altered" / original.name
        shutil.copytree(original, folder)
        change(folder)
        try:
            got = use(folder)
        except refusal as error:
            refused += 1
            if lacking := [name for name in named if Path(name).name not in str(error)]:
                wrong.append(f"{what}: {lacking} not named in {str(error)!r}")
            elif not TO_DO.search(str(error)):
                wrong.append(f"{what}: nothing to do in {str(error)!r}")
            elif len(str(error)) > 700:
                wrong.append(f"{what}: {len(str(error))} letters")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__} {str(error)[:200]}")
        else:
            same += 1
            if got != want:
                wrong.append(f"{what}: other results")
    assert not wrong, f"{len(wrong)} of {same + refused}:\n" + "\n".join(wrong[:60])
    return same, refused


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "images"
    good_pictures(folder, 4)
    (folder / "bad.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def store(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored") / "store"
    extract(images, FakeEncoder(unit=1), out, crops=2, shard_bytes=5 * RECORD_BYTES)
    return out


class TestFeatureStore:
    SHARDS = tuple(f"features-{i:05d}.safetensors" for i in range(2))

    @staticmethod
    def read(folder: Path) -> object:
        store = FeatureStore(folder)
        facts = (store.tokens, store.width, store.layer, store.unit, store.fingerprint, store.encoder)
        return facts, store.records, store.bad, store.batch(range(len(store))).numpy().tobytes()

    def resumed(self, images: Path) -> Callable[[Path], object]:
        def use(folder: Path) -> object:
            extract(images, FakeEncoder(unit=1), folder, crops=3, shard_bytes=5 * RECORD_BYTES)
            return {name: data for name, data in contents(folder).items() if name.startswith("features")}

        return use

    def alterations(self, store: Path) -> Iterator[tuple[str, Change, Sequence[str]]]:
        values = json.loads((store / INDEX).read_text())
        yield from fields_of(INDEX, values)
        yield from in_file(INDEX, of_json())
        yield from in_file(INDEX, harmless())
        for name in (INDEX, *self.SHARDS):
            yield from of_places(name)
        for name in self.SHARDS:
            yield from in_file(name, of_bytes())

        def swapped(folder: Path) -> None:
            one, other = (folder / name for name in self.SHARDS)
            one.rename(folder / "x")
            other.rename(one)
            (folder / "x").rename(other)

        yield "swapped", swapped, [self.SHARDS[0]]

    def test_read(self, store: Path, tmp_path: Path) -> None:
        same, refused = tried(store, self.alterations(store), self.read, StoreError, tmp_path)
        assert same < 12  # other spellings, links
        assert refused > 400

    def test_gone_on_with(self, store: Path, images: Path, tmp_path: Path) -> None:
        """A sample, since every one looks at all pictures."""
        wanted = [
            a for i, a in enumerate(self.alterations(store)) if i % 7 == 0 and "index.json gone" not in a[0]
        ]
        tried(store, iter(wanted), self.resumed(images), StoreError, tmp_path)


TINY = dataclasses.replace(RECIPE, epochs=2, slots=(2, 4))


def train(folder: Path) -> object:
    done = run(folder, Fake(), TINY)
    rows = read_metrics(folder)
    for row in rows:
        row.pop("images_per_second", None)
    pruner = {name: data for name, data in contents(folder / "pruner").items() if name != "README.md"}
    state = {name: value.numpy().tobytes() for name, value in load_file(folder / STATE).items()}
    return dataclasses.replace(done, pruner=Path(), resumed=0), rows, pruner, state


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 16 steps, stopped in step 12: its state is that after step 9, its best pruner step 8's."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    whole = trainer_module._Run._step

    def step(self: Any, *arguments: Any) -> None:
        if self._state.step == 11:
            raise KeyboardInterrupt
        whole(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module._Run, "_step", step)
        patch.setattr(trainer_module, "plot_loss", lambda folder: True)
        with pytest.raises(KeyboardInterrupt):
            train(out)
    (out / PLOT).write_bytes(b"a picture")
    return out


class TestTrainingRun:
    @pytest.fixture(autouse=True)
    def no_plots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trainer_module, "plot_loss", lambda folder: True)

    def facts(self, change: Callable[[str], str]) -> Change:
        """Of the state, its JSON."""

        def apply(folder: Path) -> None:
            data = (folder / STATE).read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:end])
            header["__metadata__"][KEY] = change(header["__metadata__"][KEY])
            text = json.dumps(header).encode()
            (folder / STATE).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

        return apply

    def tensors(
        self, change: Callable[[dict[str, torch.Tensor], str], None], of: str = "parameter."
    ) -> Change:
        """Of the state, its tensors; ``change`` is told the first name that starts with ``of``."""

        def apply(folder: Path) -> None:
            with safe_open(folder / STATE, "pt") as file:
                facts = file.metadata()
            tensors = load_file(folder / STATE)
            change(tensors, min(name for name in tensors if name.startswith(of)))
            save_file(tensors, folder / STATE, metadata=facts)

        return apply

    def of_facts(self, stopped: Path) -> Iterator[tuple[str, Change, Sequence[str]]]:
        with safe_open(stopped / STATE, "pt") as file:
            values = json.loads(file.metadata()[KEY])
        digest = next(iter(values["tensors"]))  # one stands for all
        for what, altered, field in of_values({**values, "tensors": {digest: values["tensors"][digest]}}):
            if isinstance(altered.get("tensors"), dict) and altered["tensors"]:
                altered["tensors"] = {**values["tensors"], **altered["tensors"]}
            if altered != values:
                text = json.dumps(altered)
                yield f"state {what}", self.facts(lambda _, text=text: text), [STATE, field]
        for alteration in of_json():
            if "UTF" not in alteration.name:  # safetensors itself writes nothing else
                change = self.facts(lambda old, a=alteration: a.apply(old.encode()).decode("latin-1"))
                yield f"state {alteration.name}", change, [STATE]
        yield "state without facts", lambda f: save_file(load_file(f / STATE), f / STATE), [STATE]

    def of_state(self) -> Iterator[tuple[str, Change, Sequence[str]]]:
        yield from of_places(STATE)
        yield from in_file(STATE, of_bytes())

        def other(tensors: dict[str, torch.Tensor], name: str) -> None:
            tensors[name].view(-1)[0] += 1

        def doubled(tensors: dict[str, torch.Tensor], name: str) -> None:
            tensors[name] = tensors[name].double()

        def reshaped(tensors: dict[str, torch.Tensor], name: str) -> None:
            tensors[name] = tensors[name].reshape(1, -1)

        def swapped(tensors: dict[str, torch.Tensor], name: str) -> None:
            pair = next(n for n in tensors if n != name and tensors[n].shape == tensors[name].shape)
            tensors[name], tensors[pair] = tensors[pair], tensors[name]

        def dropped(tensors: dict[str, torch.Tensor], name: str) -> None:
            del tensors[name]

        def added(tensors: dict[str, torch.Tensor], name: str) -> None:
            tensors[name + "x"] = tensors[name].clone()

        for change in (other, doubled, reshaped, swapped, dropped, added):
            for of in ("parameter.pruner.slot_mean", "optimizer.pruner.slot_mean"):
                yield f"{of} {change.__name__}", self.tensors(change, of), [STATE, of]

    def beside(self, stopped: Path) -> Iterator[tuple[str, Change, Sequence[str]]]:
        def other_loss(old: bytes) -> bytes:
            rows = old.decode().splitlines()
            return ("\n".join([rows[0].replace('"loss": ', '"loss": 1'), *rows[1:]]) + "\n").encode()

        rows = (
            Alteration("another loss", other_loss),
            Alteration("a row less", lambda old: old[old.index(b"\n") + 1 :]),
            Alteration("a row twice", lambda old: old[: old.index(b"\n") + 1] + old),
            Alteration("rows of a dead run", lambda old: old + b'{"kind": "train", "step": 10}\n{"ki'),
            Alteration("junk after it", lambda old: old + b"\xff\xfe"),
        )
        yield from in_file(METRICS, iter(rows))
        yield from in_file(METRICS, of_bytes())
        for name in (METRICS, "pruner/config.json", "pruner/model.safetensors", "pruner/training.json"):
            yield from of_places(name)
        for name in ("pruner/model.safetensors", "pruner/training.json"):
            yield from in_file(name, of_bytes())
        config = json.loads((stopped / "pruner/config.json").read_text())
        for what, change, _ in list(fields_of("pruner/config.json", config))[
            ::10
        ]:  # one digest for all fields
            yield what, change, ["config.json"]

    def test_the_states_facts(self, stopped: Path, tmp_path: Path) -> None:
        (tmp_path / "alone").mkdir()
        shutil.copy(stopped / STATE, tmp_path / "alone")
        facts = list(self.of_facts(stopped))
        same, refused = tried(tmp_path / "alone", iter(facts), read_progress, ResumeError, tmp_path)
        assert same <= 3  # missing digests of which there are many
        assert refused > 400
        tried(stopped, iter(facts[::100]), train, ResumeError, tmp_path / "gone on with")

    def test_the_state(self, stopped: Path, tmp_path: Path) -> None:
        same, refused = tried(stopped, self.of_state(), train, ResumeError, tmp_path)
        assert same <= 2
        assert refused > 30

    def test_what_lies_beside_it(self, stopped: Path, tmp_path: Path) -> None:
        same, refused = tried(stopped, self.beside(stopped), train, ResumeError, tmp_path)
        assert same <= 8
        assert refused > 80

    def test_what_stands_in_the_way(self, stopped: Path, tmp_path: Path) -> None:
        """Folders and links where a run writes; what a link leads to is never touched."""
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.txt").write_text("mine")

        def folder_at(name: str) -> Change:
            def change(folder: Path) -> None:
                target = folder / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
                target.mkdir()
                (target / "x").touch()

            return change

        def link_at(name: str) -> Change:
            return lambda folder: (folder / name).symlink_to(mine)

        def file_at(name: str) -> Change:
            def change(folder: Path) -> None:
                shutil.rmtree(folder / name, ignore_errors=True)
                (folder / name).write_text("a file")

            return change

        def alterations() -> Iterator[tuple[str, Change, Sequence[str]]]:
            for name in (PLOT, METRICS, STATE):
                yield f"a folder {name}", folder_at(name), [name]
            for name in ("pruner", "tensorboard"):
                yield f"a file {name}", file_at(name), [name]
            for name in (PLOT, STATE, METRICS, "pruner"):
                partial = name + ".partial"
                yield f"a link {partial}", link_at(partial), [partial]
                if name != "pruner":  # the same way
                    yield f"a folder {partial}", folder_at(partial), [partial]
                    yield f"a file {partial}", file_at(partial), [partial]

        tried(stopped, alterations(), train, ResumeError, tmp_path)
        assert [path.name for path in mine.iterdir()] == ["thesis.txt"]

    def test_an_older_state_is_gone_on_from(self, stopped: Path, tmp_path: Path) -> None:
        """Copied back from a backup: what came after it is done again."""
        run(tmp_path / "run", Fake(), TINY)
        whole = train(tmp_path / "run")
        assert train(shutil.copytree(stopped, tmp_path / "again")) == whole


@pytest.mark.parametrize("moment", ["state", "first file", "second file"])
def test_killed_while_the_best_pruner_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Before the state knows it, and between its files: it ends as an undisturbed run."""
    monkeypatch.setattr(trainer_module, "plot_loss", lambda folder: True)
    one = dataclasses.replace(TINY, epochs=1)
    run(tmp_path / "whole", Fake(), one)

    class Killed(BaseException):
        pass

    real, left = os.replace, {"state": 0, "first file": 1, "second file": 2}[moment]
    counting = False

    def replace(source: Path, target: Path) -> None:
        nonlocal left, counting
        counting = counting or (Path(target).name == STATE and (tmp_path / "run" / "pruner.partial").exists())
        if counting:
            left -= 1
            if left < 0:
                raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        with pytest.raises(Killed):
            run(tmp_path / "run", Fake(), one)
    done = run(tmp_path / "run", Fake(), one)
    assert done.resumed == (6 if moment == "state" else 8)
    assert contents(tmp_path / "run" / "pruner") == contents(tmp_path / "whole" / "pruner")
    assert not list((tmp_path / "run").rglob("*.partial"))
