"""Stored features: read back exactly, checked, refused when damaged or foreign, shared between processes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ocvtp.stored.seal import sealed, unsealed
from ocvtp.training.store import INDEX, FeatureStore, Index, Record, StoreError, write_shard

ROWS = (3, 2, 4)
N, C = 5, 6


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(sum(ROWS), N, C, generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture
def folder(tmp_path: Path, values: torch.Tensor) -> Path:
    index = Index("finger", {"weights": "w"}, 8, N, C)
    start = 0
    for number, count in enumerate(ROWS):
        records = [Record(f"digest{i}", f"p{i}.png", i % 2) for i in range(start, start + count)]
        index.shards.append(write_shard(tmp_path, number, values[start : start + count], records))
        start += count
    index.write(tmp_path)
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index.update(values)
    (folder / INDEX).write_text(json.dumps({k: v for k, v in index.items() if v != "gone"}))


def test_read_back(folder: Path, values: torch.Tensor) -> None:
    store = FeatureStore(folder, verify=True)
    assert len(store) == 9
    assert (store.tokens, store.width, store.layer, store.fingerprint) == (N, C, 8, "finger")
    assert store.images == [f"digest{i}" for i in range(9)]
    assert torch.equal(store.batch(range(9)), values)
    assert torch.equal(store.batch([8, 0, 3, 3]), values[[8, 0, 3, 3]])
    assert torch.equal(store[4], values[4])
    assert torch.equal(store.batch([-1]), values[[-1]])
    assert store.batch([]).shape == (0, N, C)
    with pytest.raises(IndexError):
        store.batch([9])


def test_an_index_survives_writing(folder: Path, tmp_path: Path) -> None:
    index = Index.read(folder)
    before = (folder / INDEX).read_bytes()
    index.write(folder)
    assert (folder / INDEX).read_bytes() == before


def test_in_other_processes(folder: Path, values: torch.Tensor) -> None:
    store = FeatureStore(folder)
    store.batch([0])
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.batch([1, 7]), values[[1, 7]])
    loader = torch.utils.data.DataLoader(store, batch_size=4, num_workers=1)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(list(loader)), values)


def test_features_that_are_not_whole_in_memory(tmp_path: Path, values: torch.Tensor) -> None:
    """A view into something larger is stored alone."""
    shard = write_shard(tmp_path, 0, values[2:4], [Record("a", "a", 0), Record("b", "b", 0)])
    assert torch.equal(load_file(tmp_path / shard.file)["features"], values[2:4])
    assert (tmp_path / shard.file).stat().st_size < 2 * N * C * 2 + 200


class TestRefused:
    def test_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"has no index.json.* ocvtp features"):
            FeatureStore(tmp_path)
        with pytest.raises(StoreError, match=r"has no index.json"):
            FeatureStore(tmp_path / "nowhere")

    @pytest.mark.parametrize("size", [0, 1, 100, 500])
    def test_an_index_that_was_cut_off(self, folder: Path, size: int) -> None:
        path = folder / INDEX
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(StoreError, match=r"index.json: it can't be read.*make the features again"):
            FeatureStore(folder)

    def test_an_index_that_is_no_text(self, folder: Path) -> None:
        (folder / INDEX).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(StoreError, match="it is no text in UTF-8"):
            FeatureStore(folder)

    @pytest.mark.parametrize("text", ["{}", '{"schema": 1}', '{"schema": "2"}', '{"schema": true}'])
    def test_of_another_version(self, folder: Path, text: str) -> None:
        (folder / INDEX).write_text(text)
        with pytest.raises(StoreError, match="was not written by this version of ocvtp"):
            FeatureStore(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": "gone"}, "it lacks tokens, which was written"),
            ({"shards": "gone", "bad": "gone"}, "it lacks bad, shards"),
            ({"width": "6"}, "width is not what was written: changed or damaged"),
            ({"layer": 9}, "layer is not what was written"),
            ({"layer": 9, "tokens": 4}, "layer, tokens are not what was written"),
            ({"encoder": {"weights": "w", "unit": 2}}, "encoder is not what was written"),
            ({"colour": "red"}, "it has colour, which was never written"),
            ({"seal": "gone"}, "seal is missing"),
            ({"seal": []}, "seal is not what was written"),
        ],
    )
    def test_an_index_that_is_wrong(self, folder: Path, changes: dict, message: str) -> None:
        change(folder, **changes)
        with pytest.raises(StoreError, match=message):
            FeatureStore(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"width": "6"}, "width must be an int of at least 1 and at most 1048576; got '6'"),
            ({"width": 10**12}, "width must be"),
            ({"layer": None}, "layer must be an int"),
            ({"layer": True}, "layer must be an int"),
            ({"encoder": []}, r"encoder must be an object; got \[\]"),
            ({"encoder": {"unit": [2]}}, r"encoder\.unit must be an int"),
            ({"shards": [1]}, r"shards\[0\] must be an object; got 1"),
            ({"shards": {"a": 1}}, "shards must be a list"),
            (
                {"shards": [{"file": "../x", "sha256": "", "records": []}]},
                r"shards\[0\].file must be 'features-0",
            ),
            ({"bad": [{"path": "x"}]}, r"bad\[0\] lacks image, crop, reason"),
            ({"shards": []}, "holds no features yet"),
            ({"tokens": 4}, r"holds F16 \[3, 5, 6\], the index says F16 \[3, 4, 6\]"),
        ],
    )
    def test_a_seal_alone_is_not_trusted(self, folder: Path, changes: dict, message: str) -> None:
        values = {**unsealed(json.loads((folder / INDEX).read_text())), **changes}
        (folder / INDEX).write_text(json.dumps(sealed(values)))
        with pytest.raises(StoreError, match=message):
            FeatureStore(folder)

    def test_missing_and_cut_shards(self, folder: Path) -> None:
        shard = folder / "features-00001.safetensors"
        data = shard.read_bytes()
        for size in (0, 4, 50, len(data) - 1):
            shard.write_bytes(data[:size])
            with pytest.raises(StoreError, match=r"features-00001\.safetensors is damaged"):
                FeatureStore(folder)
        shard.unlink()
        with pytest.raises(StoreError, match=r"features-00001\.safetensors is missing"):
            FeatureStore(folder)

    def test_shards_that_vanish_later(self, folder: Path) -> None:
        store = FeatureStore(folder)
        (folder / "features-00002.safetensors").unlink()
        with pytest.raises(StoreError, match=r"features-00002\.safetensors is missing"):
            store.batch([8])

    @pytest.mark.parametrize(
        "tensors",
        [
            {"other": torch.ones(2)},
            {"features": torch.ones(2, N, C)},
            {"features": torch.ones(3, N, C).half()},
        ],
    )
    def test_shards_of_something_else(self, folder: Path, tensors: dict) -> None:
        save_file(tensors, folder / "features-00001.safetensors")
        with pytest.raises(StoreError, match=r"features-00001\.safetensors"):
            FeatureStore(folder)

    def test_one_flipped_bit(self, folder: Path) -> None:
        shard = folder / "features-00002.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        store = FeatureStore(folder, verify=False)
        with pytest.raises(StoreError, match=r"features-00002\.safetensors is damaged: its checksum"):
            store.verify()
        with pytest.raises(StoreError, match=r"features-00002\.safetensors is damaged"):
            FeatureStore(folder)

    def test_never_pickle(self, folder: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple:
                return (pytest.fail, ("unpickled",))

        for name in ("features-00000.safetensors", INDEX):
            (folder / name).write_bytes(pickle.dumps(Trap()))
            with pytest.raises(StoreError):
                FeatureStore(folder)
