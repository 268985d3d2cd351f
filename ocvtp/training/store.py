"""Stored features: shards of safetensors and an index that says what they are.

``index.json`` names encoder, layer and shape, and for every shard its file, checksum and records: from
which photograph (digest of its content), which file that was, which crop. It is written after every shard,
atomically, so that whenever a run dies the store holds whole shards and their index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ocvtp.atomic import write_atomic, write_json

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
    """A file that can't be used: digest of its content, and why."""

    image: str
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
        bad: file -> why it was skipped.
    """

    fingerprint: str
    encoder: dict[str, Any]
    layer: int
    tokens: int
    width: int
    shards: list[Shard] = field(default_factory=list)
    bad: dict[str, Bad] = field(default_factory=dict)

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
            bad = {name: Bad(**entry) for name, entry in values.pop("bad").items()}
            return cls(shards=shards, bad=bad, **values)
        except (AttributeError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is not an index of features ({error}); make them again") from error


def write_shard(folder: Path, number: int, features: torch.Tensor, records: Sequence[Record]) -> Shard:
    """Write ``[n, N, C]`` float16, atomically. The index does not know of it yet."""
    from safetensors.torch import save_file

    name = f"features-{number:05d}.safetensors"
    write_atomic(folder / name, lambda partial: save_file({_TENSOR: features.contiguous()}, partial))
    return Shard(name, _sha256(folder / name), tuple(records))


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
        self.fingerprint = index.fingerprint
        self.encoder: Mapping[str, Any] = index.encoder
        self.bad: Mapping[str, str] = {name: bad.reason for name, bad in index.bad.items()}
        self._shards = index.shards
        self.records = [record for shard in index.shards for record in shard.records]
        self.images = [record.image for record in self.records]
        # Record -> shard, row in it.
        self._places = [(i, row) for i, shard in enumerate(index.shards) for row in range(len(shard.records))]
        self._open: dict[int, Any] = {}
        if not self.records:
            raise StoreError(f"{self.folder} holds no features yet; run ocvtp features to its end")
        for shard in self._shards:
            if not (self.folder / shard.file).is_file():
                raise StoreError(f"{self.folder / shard.file} is missing; copy it back or make them again")
        if verify:
            self.verify()
        for i, shard in enumerate(self._shards):
            self._check_shape(i, shard)

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

    def _slice(self, shard: int) -> Any:
        from safetensors import SafetensorError, safe_open

        if shard not in self._open:
            path = self.folder / self._shards[shard].file
            try:
                self._open[shard] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise StoreError(f"{path} can't be read ({error}); make the features again") from error
        return self._open[shard].get_slice(_TENSOR)

    def _check_shape(self, number: int, shard: Shard) -> None:
        from safetensors import SafetensorError

        want = [len(shard.records), self.tokens, self.width]
        try:
            found = self._slice(number)
            shape, dtype = list(found.get_shape()), found.get_dtype()
        except SafetensorError as error:
            raise StoreError(f"{self.folder / shard.file} holds no features ({error})") from error
        if shape != want or dtype != "F16":
            raise StoreError(
                f"{self.folder / shard.file} holds {dtype} {shape}, the index says F16 {want}; "
                "make the features again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files belong to this process


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        total = hashlib.sha256()
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()
