"""Stored features: shards of safetensors and an index that says what they are.

``index.json`` names encoder, layer and shape, and for every shard its file, checksum and records: from
which photograph (digest of its content), which file that was, which crop. It is written after every shard,
atomically, so that whenever a run dies the store holds whole shards and their index. It is sealed: of every
field it holds a digest, and one that was altered since is refused by its name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from ocvtp.atomic import PARTIAL, write_atomic, write_json
from ocvtp.stored.fields import Within, check_value, from_object
from ocvtp.stored.lock import lock
from ocvtp.stored.refused import Refused, refused_as, shown
from ocvtp.stored.seal import file_digest, sealed, unsealed
from ocvtp.stored.strict_json import read_object

INDEX = "index.json"
_SCHEMA = 2
_TENSOR = "features"
_AGAIN = "copy it back as it was, or delete the folder and make the features again"
_Unit = Annotated[int, Within(1, 64)]

#: Called with bytes done and bytes in all.
Watch = Callable[[int, int], None]


class StoreError(ValueError):
    """A folder that does not hold the features it should; the message says what to do."""


@dataclass(frozen=True)
class Record:
    """One stored image: the photograph's digest, its file when it was read, and the crop of it."""

    image: str
    path: str
    crop: Annotated[int, Within(0, 2**31)]


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
    crop: Annotated[int | None, Within(0, 2**31)]
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
    layer: Annotated[int, Within(0, 1000)]
    tokens: Annotated[int, Within(1, 2**20)]
    width: Annotated[int, Within(1, 2**20)]
    shards: list[Shard] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)

    @property
    def skipped(self) -> dict[str, str]:
        """File -> why it, or a crop of it, was skipped."""
        return {bad.path: bad.reason for bad in self.bad}

    @property
    def unit(self) -> int:
        """Patches along the side of a token."""
        unit: int = self.encoder.get("unit", 1)
        return unit

    def write(self, folder: Path) -> None:
        """Atomically into ``folder``."""
        write_json(folder / INDEX, sealed({"schema": _SCHEMA, **asdict(self)}))

    @classmethod
    def read(cls, folder: Path) -> Index:
        """What a folder says of itself.

        Raises:
            StoreError: no index, or one that is not what was written; names the field.
        """
        path = folder / INDEX
        if not path.exists():
            raise StoreError(f"{folder} has no {INDEX}: it holds no features. Make some with: ocvtp features")
        with refused_as(StoreError, path, _AGAIN):
            values = read_object(path)
            if (schema := values.get("schema")) != _SCHEMA or type(schema) is not int:
                raise Refused(
                    f"it was not written by this version of ocvtp (schema {shown(schema)}, not {_SCHEMA})"
                )
            values = unsealed(values)
            del values["schema"]
            index = from_object(cls, values)
            check_value(_Unit, index.unit, "encoder.unit")
            for number, shard in enumerate(index.shards):
                if shard.file != _shard_name(number):
                    raise Refused(f"shards[{number}].file must be {_shard_name(number)!r}")
        return index

    @classmethod
    def begun(cls, folder: Path) -> Index | None:
        """What a run that is to write into ``folder`` goes on with; ``None`` if it is to be made anew.

        Raises:
            StoreError: the folder holds something else, or features that are damaged.
        """
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file; give a folder")
        if folders := sorted(path for path in folder.glob("features-*.safetensors") if path.is_dir()):
            raise StoreError(f"{folders[0]} is a folder; features are stored in a file there: move it away")
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
    return Shard(name, file_digest(folder / name), tuple(records))


def open_shard(folder: Path, shard: Shard, tokens: int, width: int) -> Any:
    """The shard's file, as ``safe_open`` gives it. Its checksum is not compared.

    Raises:
        StoreError: a file that is missing, cut off, or of another shape than the index says.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / shard.file
    if not path.is_file():
        raise StoreError(f"{path} is {'no file' if path.exists() else 'missing'}; {_AGAIN}")
    try:
        file = safe_open(path, "pt")
        found = file.get_slice(_TENSOR)
        shape, dtype = list(found.get_shape()), found.get_dtype()
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is damaged ({error}); {_AGAIN}") from error
    if (shape, dtype) != ([len(shard.records), tokens, width], "F16"):
        raise StoreError(
            f"{path} holds {dtype} {shape}, "
            f"the index says F16 {[len(shard.records), tokens, width]}; {_AGAIN}"
        )
    return file


def check_shards(folder: Path, shards: Sequence[Shard], watch: Watch | None = None) -> None:
    """Read everything that is stored and compare checksums.

    Raises:
        StoreError: names the first file that is not what was written.
    """
    paths = [folder / shard.file for shard in shards]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    for number, shard in enumerate(shards):
        if watch is not None:
            watch(sum(sizes[:number]), sum(sizes))
        path = folder / shard.file
        try:
            found = file_digest(path)
        except OSError as error:
            raise StoreError(f"{path} can't be read ({error.strerror}); {_AGAIN}") from error
        if found != shard.sha256:
            raise StoreError(f"{path} is damaged: its checksum is not the index's; {_AGAIN}")
    if watch is not None:
        watch(sum(sizes), sum(sizes))


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep a second run out of ``folder``, where the system can; a run that dies lets go of it.

    Raises:
        StoreError: another process is writing there.
    """
    if os.name != "posix":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not lock(descriptor):
            raise StoreError(f"another process is writing to {folder}; wait for it to end")
        yield
    finally:
        os.close(descriptor)


class FeatureStore:
    """Stored features, read from the disk as they are asked for.

    A :class:`~ocvtp.training.source.FeatureSource`; may be pickled and read by several processes.

    Args:
        folder: what ``ocvtp features`` wrote.
        verify: compare every shard's checksum first, which reads all of them: about a second for a gigabyte.

    Raises:
        StoreError: not such a folder, no features in it, or a shard that is missing or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        index = Index.read(self.folder)
        self.tokens, self.width, self.layer = index.tokens, index.width, index.layer
        self.unit = index.unit
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

    def verify(self, watch: Watch | None = None) -> None:
        """Read everything and compare checksums.

        Raises:
            StoreError: names the first file that is not what was written.
        """
        check_shards(self.folder, self._shards, watch)

    def _slice(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = open_shard(self.folder, self._shards[number], self.tokens, self.width)
        return self._open[number].get_slice(_TENSOR)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files belong to this process


def _shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"
