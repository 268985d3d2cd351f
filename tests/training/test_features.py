"""Features of a folder of images: whole, in order, resumable at any moment, never mixed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ocvtp.images import NoImagesError, decode, digest, square
from ocvtp.training import store as stores
from ocvtp.training.features import Extracted, ImageFeatures, extract
from ocvtp.training.store import INDEX, FeatureStore, Index, StoreError
from tests.training.pictures import (
    BROKEN,
    GOOD,
    HOT,
    RECORD_BYTES,
    FakeEncoder,
    contents,
    good_pictures,
    mixed_pictures,
    noise,
)

CROPS = 3
SHARD = 4 * RECORD_BYTES + 1  # four records in a file, three of each image: images straddle files
ROOT = Path(__file__).parents[2]


def run(folder: Path, out: Path, **changes: Any) -> Extracted:
    """Three at a time: batches have to be cut short where a shard ends."""
    encoder = changes.pop("encoder", None) or FakeEncoder()
    settings: dict[str, Any] = {"crops": CROPS, "batch": 3, "shard_bytes": SHARD, **changes}
    return extract(folder, encoder, out, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mixed_pictures(tmp_path / "images")


def test_what_is_stored(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, int]] = []
    made = run(folder, tmp_path / "out", progress=lambda *numbers: calls.append(numbers))
    store = FeatureStore(tmp_path / "out", verify=True)
    good = GOOD * CROPS + CROPS - 1  # the whole of picture03half is not finite
    assert (made.new, made.total, made.duplicates) == (good, good, 1)
    assert len(store) == len(store.images) == good
    assert (store.tokens, store.width, store.layer) == (4, 3, 2)
    assert set(made.bad) == set(store.bad) == BROKEN | {"picture02red.png", "picture03half.png"}
    assert "zero.gif can't be decoded" in store.bad["zero.gif"]
    assert "beyond float16" in store.bad["picture02red.png"]
    assert [call[:2] for call in calls] == [(i, 13) for i in range(14)]
    assert calls[-1][2] == good + 1 + CROPS  # with those that are not finite
    sizes = [len(shard.records) for shard in Index.read(tmp_path / "out").shards]
    assert sizes == [4] * 5 + [3]
    # Every record is of the crop it says, whatever the batch did to its last bits.
    for i, record in enumerate(store.records):
        picture = square(decode(folder / record.path), record.image, record.crop)
        assert store[i].dtype == torch.float16
        assert record.image == digest(folder / record.path)
        torch.testing.assert_close(store[i], FakeEncoder()([picture])[0], rtol=0, atol=2.0)
    pairs = [(record.path, record.crop) for record in store.records]
    assert pairs == sorted(pairs)
    assert len(set(pairs)) == good


def test_batches_and_limits(folder: Path, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    run(folder, tmp_path / "one", encoder=encoder, shard_bytes=10**6, batch=100)
    assert encoder.calls == 1
    assert run(folder, tmp_path / "two", limit=3, crops=1).total == 2  # cut.jpg is the first
    run(folder, tmp_path / "three", shard_bytes=1)  # smaller than a record
    assert {len(shard.records) for shard in Index.read(tmp_path / "three").shards} == {1}


@pytest.mark.parametrize("name", ["crops", "batch", "shard_bytes", "limit"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_numbers_that_make_no_sense(folder: Path, tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an int >= 1"):
        run(folder, tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").touch()
    with pytest.raises(NoImagesError, match=r"none of the 1 images .* can be used: bad.png can't be decoded"):
        run(tmp_path / "images", tmp_path / "out")
    with pytest.raises(StoreError, match="holds no features yet"):
        FeatureStore(tmp_path / "out")
    with pytest.raises(NoImagesError, match=r"can be decoded: bad\.png"):
        ImageFeatures(tmp_path / "images", FakeEncoder())
    good_pictures(tmp_path / "images", 1)  # mended, it goes on
    assert run(tmp_path / "images", tmp_path / "out").total == CROPS


class TestAgain:
    def test_nothing_to_do(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out")
        before = contents(tmp_path / "out")
        encoder = FakeEncoder()
        assert run(folder, tmp_path / "out", encoder=encoder).new == 0
        assert encoder.calls == 0
        assert contents(tmp_path / "out") == before

    def test_images_added(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out")
        before = contents(tmp_path / "out")
        good_pictures(folder, 2, first=30)
        assert run(folder, tmp_path / "out").new == 2 * CROPS
        after = contents(tmp_path / "out")
        assert {name: after[name] for name in before if name != INDEX} == {
            name: data for name, data in before.items() if name != INDEX
        }
        FeatureStore(tmp_path / "out", verify=True)

    def test_a_changed_file_is_a_new_image(self, folder: Path, tmp_path: Path) -> None:
        total = run(folder, tmp_path / "out").total
        noise(99).save(folder / "picture00.png")
        made = run(folder, tmp_path / "out")
        assert (made.new, made.total) == (CROPS, total + CROPS)
        store = FeatureStore(tmp_path / "out")
        assert len({r.image for r in store.records if r.path == "picture00.png"}) == 2

    def test_a_mended_file_is_no_longer_bad(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out")
        noise(98).save(folder / "cut.jpg")
        noise(97).save(folder / "picture02red.png")
        made = run(folder, tmp_path / "out")
        assert made.new == 2 * CROPS
        assert set(made.bad) == {"picture03text.png", "zero.gif", "picture03half.png"}

    def test_renamed_files_are_known(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out")
        for name in ("picture00.png", "cut.jpg", "picture02red.png"):
            (folder / name).rename(folder / f"was_{name}")
        encoder = FakeEncoder()
        assert run(folder, tmp_path / "out", encoder=encoder).new == encoder.calls == 0

    def test_a_bad_file_renamed_and_replaced(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out")
        (folder / "cut.jpg").rename(folder / "cutagain.jpg")
        noise(96).save(folder / "cut.jpg")
        bad = run(folder, tmp_path / "out").bad
        assert "cutagain.jpg" in bad
        assert "cut.jpg" not in bad

    def test_more_crops(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out", crops=2)
        before = len(FeatureStore(tmp_path / "out"))
        assert run(folder, tmp_path / "out", crops=3).new == GOOD + 1
        records = FeatureStore(tmp_path / "out").records
        assert len({(r.image, r.crop) for r in records}) == len(records) == before + GOOD + 1
        assert run(folder, tmp_path / "out", crops=1).new == 0

    def test_a_file_that_could_not_be_read(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Path.read_bytes

        def read(path: Path) -> bytes:
            if path.name == "picture00.png":
                raise PermissionError(13, "Permission denied")
            return real(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", read)
            for _ in range(2):
                bad = run(folder, tmp_path / "out").bad
                assert bad["picture00.png"] == "picture00.png can't be read: Permission denied"
            assert "can't be read" in ImageFeatures(folder, FakeEncoder()).bad["picture00.png"]
        assert len(Index.read(tmp_path / "out").bad) == 3 + 1 + CROPS + 1  # nothing is listed twice
        made = run(folder, tmp_path / "out")
        assert made.new == CROPS
        assert "picture00.png" not in made.bad


class Died(BaseException):
    """What a kill looks like from inside."""


def dying(after: int, real: Callable[..., Any]) -> Callable[..., Any]:
    left = after

    def call(*given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Died
        return real(*given, **named)

    return call


@pytest.mark.parametrize("after", range(7))
@pytest.mark.parametrize("where", ["save_file", "replace", "index", "encoder"])
def test_dying_inside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, after: int
) -> None:
    """While a shard is written, between writing and renaming, between shard and index, between batches."""
    run(folder, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if where == "save_file":
            import safetensors.torch

            def half(tensors: dict, path: Path) -> None:
                (path.parent / ".tmpAbC").write_bytes(b"1234")
                path.write_bytes(b"12")
                finish(tensors, path)

            finish = dying(after, safetensors.torch.save_file)
            patch.setattr("safetensors.torch.save_file", half)
        elif where == "replace":
            patch.setattr("os.replace", dying(after, os.replace))
        elif where == "index":
            patch.setattr(Index, "write", dying(after, Index.write))
        else:
            patch.setattr(FakeEncoder, "__call__", dying(after, FakeEncoder.__call__))
        try:
            run(folder, out)
        except Died:
            died = True
        else:
            died = False
    assert died == (after < 6 or where in ("replace", "encoder"))  # there are six shards
    run(folder, out)
    assert contents(out) == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote; slow
from tests.training.test_features import contents, run
from ocvtp.training import features
import ocvtp.atomic, ocvtp.training.store, safetensors.torch

folder, base, stride = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
ours = {ocvtp.atomic.__file__, features.__file__, ocvtp.training.store.__file__}

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def killed(point, out):
    def trace(frame, event, _):
        nonlocal point
        if frame.f_code.co_filename not in ours:
            return None
        if event == "line":
            point -= 1
            if point < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    def work():
        sys.settrace(trace)
        run(folder, out)
    return child(work)

assert child(lambda: run(folder, base / "whole")) == 0
whole = contents(base / "whole")
kills, point, left = 0, stride // 2, set()
while True:
    out = base / f"at{point}"
    status = killed(point, out)
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    left.add(tuple(sorted(os.listdir(out))) if out.exists() else ())
    assert child(lambda: run(folder, out)) == 0, (point, left)
    assert contents(out) == whole, point
    kills, point = kills + 1, point + stride
print(kills, len(left))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(folder: Path, tmp_path: Path) -> None:
    """SIGKILL at every so many lines of ours, then once more to the end: the same bytes."""
    result = subprocess.run(
        [sys.executable, "-c", KILLED, folder, tmp_path, "101"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kills, states = map(int, result.stdout.split())
    assert kills >= 10
    assert states >= 5  # folders that looked different when the run died


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"weights": "x"}, "weights"),
            ({"preprocessing": {"size": 3}, "layer": 3}, "layer, preprocessing"),
            ({"dtype": "bfloat16", "weights": "rounded"}, "dtype"),
            ({"registers": 4}, "registers"),
        ],
    )
    def test_another_encoder(self, folder: Path, tmp_path: Path, change: dict, named: str) -> None:
        run(folder, tmp_path / "out")
        before = contents(tmp_path / "out")
        with pytest.raises(StoreError, match=rf"another encoder \(different {named}\)"):
            run(folder, tmp_path / "out", encoder=FakeEncoder(**change))
        assert contents(tmp_path / "out") == before

    @pytest.mark.parametrize("name", ["mine.txt", "features-00001.safetensors", ".hidden"])
    def test_a_folder_of_something_else(self, folder: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).touch()
        with pytest.raises(StoreError, match=f"holds other things.*{name}"):
            run(folder, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == [name]

    def test_a_file(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "out").touch()
        with pytest.raises(StoreError, match="is a file; give a folder"):
            run(folder, tmp_path / "out")

    def test_one_flipped_bit(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out")
        shard = tmp_path / "out" / "features-00001.safetensors"
        data = shard.read_bytes()
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        encoder = FakeEncoder()
        with pytest.raises(StoreError, match=r"features-00001\.safetensors is damaged: its checksum"):
            run(folder, tmp_path / "out", encoder=encoder)
        assert encoder.calls == 0
        run(folder, tmp_path / "out", verify=False)

    def test_a_folder_where_a_shard_is_to_be(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out")
        (tmp_path / "out" / "features-00006.safetensors").mkdir()
        with pytest.raises(StoreError, match=r"features-00006\.safetensors is a folder.*move it away"):
            run(folder, tmp_path / "out")

    def test_links_where_files_are_being_written(self, folder: Path, tmp_path: Path) -> None:
        """What they lead to is not touched."""
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.txt").touch()
        (tmp_path / "out").mkdir()
        for name in (INDEX, "features-00000.safetensors"):
            (tmp_path / "out" / f"{name}.partial").symlink_to(mine)
        run(folder, tmp_path / "out")
        assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
        assert not list((tmp_path / "out").glob("*.partial"))

    def test_going_on_with_damaged_shards(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out")
        shard = tmp_path / "out" / "features-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(StoreError, match=r"features-00001\.safetensors is damaged"):
            run(folder, tmp_path / "out")
        shard.unlink()
        with pytest.raises(StoreError, match=r"features-00001\.safetensors is missing"):
            run(folder, tmp_path / "out")

    @pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
    def test_two_runs_at_once(self, folder: Path, tmp_path: Path) -> None:
        run(folder, tmp_path / "out")
        with stores.sole_writer(tmp_path / "out"), pytest.raises(StoreError, match="another process"):
            run(folder, tmp_path / "out")
        run(folder, tmp_path / "out")

    def test_an_encoder_that_fails_midway_keeps_what_is_whole(self, folder: Path, tmp_path: Path) -> None:
        class Failing(FakeEncoder):
            def __call__(self, images: Any) -> torch.Tensor:
                if self.calls == 5:
                    raise ValueError("no")
                return super().__call__(images)

        with pytest.raises(ValueError, match="no"):
            run(folder, tmp_path / "out", encoder=Failing())
        assert len(FeatureStore(tmp_path / "out", verify=True)) == 8


class TestOnTheFly:
    def test_the_same_bits_as_stored_ones(self, folder: Path, tmp_path: Path) -> None:
        (folder / "picture03half.png").unlink()
        (folder / "picture02red.png").unlink()
        run(folder, tmp_path / "out", batch=3, shard_bytes=10**6)
        stored, fresh = FeatureStore(tmp_path / "out"), ImageFeatures(folder, FakeEncoder(), CROPS)
        assert len(fresh) == len(stored) == GOOD * CROPS
        assert fresh.images == stored.images
        for name in ("tokens", "width", "layer", "fingerprint"):
            assert getattr(fresh, name) == getattr(stored, name)
        for start in range(0, len(stored), 3):
            indices = range(start, start + 3)
            assert torch.equal(fresh.batch(indices), stored.batch(indices))
        shuffled = [5, 0, 5, 2]
        assert torch.equal(fresh.batch(shuffled)[0], fresh.batch([5, 1])[0] + 1.0)  # batch of 4, not of 2
        assert torch.equal(stored.batch(shuffled)[2], stored[5])

    def test_bad_ones(self, folder: Path) -> None:
        fresh = ImageFeatures(folder, FakeEncoder(), 1)
        assert set(fresh.bad) == BROKEN
        hot = fresh.images.index(digest(folder / "picture03half.png"))
        assert decode(folder / "picture03half.png").size == HOT
        with pytest.raises(ValueError, match=r"picture03half.png: its features are NaN or beyond float16"):
            fresh.batch([0, hot])
        (folder / "picture00.png").write_text("gone bad")
        with pytest.raises(ValueError, match=r"picture00.png can't be decoded"):
            fresh.batch([0])
        with pytest.raises(ValueError, match="crops must be"):
            ImageFeatures(folder, FakeEncoder(), 0)

    def test_pickled(self, folder: Path) -> None:
        fresh = ImageFeatures(folder, FakeEncoder(), 1)
        assert torch.equal(pickle.loads(pickle.dumps(fresh)).batch([0, 1]), fresh.batch([0, 1]))


def test_the_index_is_plain(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "picture00.png", folder / "pict\u00fcre.png")
    noise(50).save(folder / "\u00e9t\u00e9 \u96ea.png")
    run(folder, tmp_path / "out")
    values = json.loads((tmp_path / "out" / INDEX).read_bytes().decode("ascii"))
    assert values["schema"] == 2
    assert values["encoder"] == FakeEncoder().identity
    assert any(r["path"] == "\u00e9t\u00e9 \u96ea.png" for s in values["shards"] for r in s["records"])
