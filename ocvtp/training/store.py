"""Stored features: shards of safetensors and an index that says what they are.

``index.json`` names encoder, layer and shape, and for every shard its file, checksum and records: from
which photograph (digest of its content), which file that was, which crop. It is written after every shard,
atomically, so that whenever a run dies the store holds whole shards and their index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ocvtp.atomic import PARTIAL, write_atomic, write_json

INDEX = "index.json"
_SCHEMA = 1
_TENSOR = "features"
_FIELDS = ("schema", "fingerprint", "encoder", "layer", "tokens", "width", "shards", "bad")


class StoreError(ValueError):
    """A folder that does not hold the features it should; the message says what to do."""


@dataclass(frozen=True)
class Record:
    """One stored image: the photograph's digest, its file when it was read, and the crop of it."""

    image: str
    path: str
    crop: int


@dataclass(frozen=True)
class Bad:
    """What can't be used, and why.

    Attributes:
        path: the file when it was read.
        image: digest of its content; empty if the file can't be read at all, which is tried again.
        crop: the crop whose features are not finite; ``None`` if the file can't be decoded.
        reason: for people.
    """

    path: str
    image: str
    crop: int | None
    reason: str


@dataclass(frozen=True)
class Shard:
    """One file of features ``[n, N, C]`` float16."""

    file: str
    sha256: str
    records: tuple[Record, ...]


@dataclass
class Index:
    """What ``index.json`` holds.

    Attributes:
        fingerprint: of the encoder, its preprocessing and the layer.
        encoder: what the fingerprint was made of, to tell what differs.
        layer: 0-based.
        tokens: N.
        width: C.
        shards: in the order they were written.
        bad: what was skipped, as it was met.
    """

    fingerprint: str
    encoder: dict[str, Any]
    layer: int
    tokens: int
    width: int
    shards: list[Shard] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)

    @property
    def skipped(self) -> dict[str, str]:
        """File -> why it, or a crop of it, was skipped."""
        return {bad.path: bad.reason for bad in self.bad}

    def write(self, folder: Path) -> None:
        """Atomically into ``folder``."""
        write_json(folder / INDEX, {"schema": _SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Index:
        """What a folder says of itself.

        Raises:
            StoreError: no index, one that can't be read, or of another schema.
        """
        path = folder / INDEX
        if not path.is_file():
            raise StoreError(f"{folder} has no {INDEX}: it holds no features. Make some with: ocvtp features")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} can't be read ({error}); make the features again") from error
        if not isinstance(values, dict) or values.get("schema") != _SCHEMA:
            raise StoreError(f"{path} was not written by this version of ocvtp; make the features again")
        if missing := [name for name in _FIELDS if name not in values]:
            raise StoreError(f"{path} lacks {', '.join(missing)}; make the features again")
        del values["schema"]
        try:
            shards = [
                Shard(shard["file"], shard["sha256"], tuple(Record(**record) for record in shard["records"]))
                for shard in values.pop("shards")
            ]
            bad = [Bad(**entry) for entry in values.pop("bad")]
            index = cls(shards=shards, bad=bad, **values)
        except (AttributeError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is not an index of features ({error}); make them again") from error
        sizes = (index.layer, index.tokens, index.width)
        named = all(shard.file == _shard_name(i) for i, shard in enumerate(shards))
        if not named or not all(type(size) is int for size in sizes) or not isinstance(index.encoder, dict):
            raise StoreError(f"{path} is not an index of features; make them again")
        return index

    @classmethod
    def begun(cls, folder: Path) -> Index | None:
        """What a run that is to write into ``folder`` goes on with; ``None`` if it is to be made anew.

        Raises:
            StoreError: the folder holds something else, or features that are damaged.
        """
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file; give a folder")
        if (folder / INDEX).exists():
            index = cls.read(folder)
            for shard in index.shards:
                open_shard(folder, shard, index.tokens, index.width)
            return index
        # What a run leaves that died before its first index may be overwritten; anything else may not.
        ours = {_shard_name(0), _shard_name(0) + PARTIAL, INDEX + PARTIAL}
        if foreign := sorted(path.name for path in folder.glob("*") if path.name not in ours):
            raise StoreError(f"{folder} holds other things ({foreign[0]}, ...); give an empty folder")
        return None


def write_shard(folder: Path, number: int, features: torch.Tensor, records: Sequence[Record]) -> Shard:
    """Write ``[n, N, C]`` float16, atomically. The index does not know of it yet.

    Raises:
        OSError: as when the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    name = _shard_name(number)
    try:
        write_atomic(folder / name, lambda partial: save_file({_TENSOR: features.contiguous()}, partial))
    except SafetensorError as error:
        raise OSError(f"can't write {folder / name}: {error}") from error
    return Shard(name, _sha256(folder / name), tuple(records))


def open_shard(folder: Path, shard: Shard, tokens: int, width: int) -> Any:
    """The shard's file, as ``safe_open`` gives it. Its checksum is not compared.

    Raises:
        StoreError: a file that is missing, cut off, or of another shape than the index says.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / shard.file
    if not path.is_file():
        raise StoreError(f"{path} is missing; copy it back, or delete the folder and make the features again")
    try:
        file = safe_open(path, "pt")
        found = file.get_slice(_TENSOR)
        shape, dtype = list(found.get_shape()), found.get_dtype()
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"{path} is damaged ({error}); delete the folder and make the features again"
        ) from error
    if (shape, dtype) != ([len(shard.records), tokens, width], "F16"):
        raise StoreError(
            f"{path} holds {dtype} {shape}, the index says F16 {[len(shard.records), tokens, width]}; "
            "delete the folder and make the features again"
        )
    return file


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep a second run out of ``folder``, where the system can; a run that dies lets go of it.

    Raises:
        StoreError: another process is writing there.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another process is writing to {folder}; wait for it to end") from error
        except OSError:  # a file system without locks: go without
            pass
        yield
    finally:
        os.close(descriptor)


class FeatureStore:
    """Stored features, read from the disk as they are asked for.

    A :class:`~ocvtp.training.source.FeatureSource`; may be pickled and read by several processes.

    Args:
        folder: what ``ocvtp features`` wrote.
        verify: check every shard's checksum first, which reads all of them.

    Raises:
        StoreError: not such a folder, no features in it, or a shard that is missing or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        index = Index.read(self.folder)
        self.tokens, self.width, self.layer = index.tokens, index.width, index.layer
        self.unit = int(index.encoder.get("unit", 1))
        self.fingerprint = index.fingerprint
        self.encoder: Mapping[str, Any] = index.encoder
        self.bad: Mapping[str, str] = index.skipped
        self._shards = index.shards
        self.records = [record for shard in index.shards for record in shard.records]
        self.images = [record.image for record in self.records]
        # Record -> shard, row in it.
        self._places = [(i, row) for i, shard in enumerate(index.shards) for row in range(len(shard.records))]
        self._open: dict[int, Any] = {}
        if not self.records:
            raise StoreError(f"{self.folder} holds no features yet; run ocvtp features to its end")
        for shard in self._shards:
            open_shard(self.folder, shard, self.tokens, self.width)
        if verify:
            self.verify()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> torch.Tensor:
        """``[N, C]`` float16."""
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """``[b, N, C]`` float16 of these records, in this order."""
        rows = []
        for index in indices:
            shard, row = self._places[index]
            rows.append(self._slice(shard)[row : row + 1])
        return torch.cat(rows) if rows else torch.empty(0, self.tokens, self.width, dtype=torch.float16)

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            StoreError: names the first file that is not what was written.
        """
        for shard in self._shards:
            if _sha256(self.folder / shard.file) != shard.sha256:
                raise StoreError(
                    f"{self.folder / shard.file} is damaged: its checksum is not the index's. "
                    "Delete the folder and make the features again"
                )

    def _slice(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = open_shard(self.folder, self._shards[number], self.tokens, self.width)
        return self._open[number].get_slice(_TENSOR)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files belong to this process


def _shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        total = hashlib.sha256()
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
