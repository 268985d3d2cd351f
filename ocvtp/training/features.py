"""Features of a folder of images: stored, or made as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ocvtp import images
from ocvtp.training.source import Encoder
from ocvtp.training.store import Bad, Index, Record, StoreError, check_shards, sole_writer, write_shard
from ocvtp_kernels._checks import as_int

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_SHARD_MB = 512
DEFAULT_BATCH = 8


class _Job(NamedTuple):
    """One record to be made."""

    record: Record
    file: Path


@dataclass(frozen=True)
class Extracted:
    """What :func:`extract` did.

    Attributes:
        new: records written by this call.
        total: records in the store.
        bad: file -> why it was skipped, of this and earlier calls.
        duplicates: files whose content another file has, too.
    """

    new: int
    total: int
    bad: dict[str, str]
    duplicates: int


def extract(
    folder: Path,
    encoder: Encoder,
    out: Path,
    *,
    crops: int = 1,
    batch: int = DEFAULT_BATCH,
    shard_bytes: int = DEFAULT_SHARD_MB * 10**6,
    limit: int | None = None,
    verify: bool = True,
    progress: Callable[[int, int, int], None] | None = None,
) -> Extracted:
    """Store features of every image below ``folder``.

    A run that died, at any moment, is taken up where its last complete shard ends, and leaves the files it
    would have left undisturbed. Images that were added since are added; those changed since count as new,
    and what is stored of files that are gone stays.

    Args:
        folder: of images, read in the order of their names; equal files count once.
        encoder: makes the features.
        out: folder of the store; made if it is not there.
        crops: records of each image: the whole, then random squares of at least half its shorter side, always
            the same ones for the same content.
        batch: images that the encoder sees at once.
        shard_bytes: of features in a file, at most, but for one record. A shard is in memory while it grows,
            and once more while it is written.
        limit: take the first so many images only.
        verify: compare the checksums of what is stored already, before anything is added.
        progress: called with images done, images in all, and records made so far by this call.

    Raises:
        StoreError: ``out`` holds something else, features that are damaged or of another encoder, layer or
            preprocessing, or another run writes to it.
        EncoderError: an image of which the encoder can't make as many tokens as of others.
        NoImagesError: no images, or none that can be used.
        ValueError: a number that makes no sense.
    """
    for name, value in (("batch", batch), ("shard_bytes", shard_bytes), ("limit", limit)):
        if value is not None:
            _check_count(name, value)
    _check_count("crops", crops)
    files = images.find_images(folder)[:limit]
    Index.begun(out)  # its errors, before the folder is made
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out):
        index = _index(out, encoder)
        if verify:
            check_shards(out, index.shards)
        before = sum(len(shard.records) for shard in index.shards)
        writer = _Writer(out, encoder, index, batch, shard_bytes, len(files) * crops)
        duplicates = _add_all(files, folder, index, writer, crops, progress)
    total = sum(len(shard.records) for shard in index.shards)
    if total == 0:
        reasons = "; ".join(list(index.skipped.values())[:3])
        raise images.NoImagesError(f"none of the {len(files)} images in {folder} can be used: {reasons}")
    return Extracted(total - before, total, index.skipped, duplicates)


def _add_all(
    files: Sequence[Path],
    folder: Path,
    index: Index,
    writer: _Writer,
    crops: int,
    progress: Callable[[int, int, int], None] | None,
) -> int:
    """Make what is not there yet; returns the number of duplicates."""
    done = {(record.image, record.crop) for shard in index.shards for record in shard.records}
    done |= {(bad.image, bad.crop) for bad in index.bad if bad.crop is not None}
    broken = {bad.image for bad in index.bad if bad.crop is None}
    seen: set[str] = set()
    duplicates = 0
    for number, file in enumerate(files):
        name = file.relative_to(folder).as_posix()
        if progress is not None:
            progress(number, len(files), writer.made)
        try:
            content = images.digest(file)
        except images.BadImageError as error:
            writer.skip(Bad(name, "", None, _short(error, file, name)))
            continue
        if content in seen:
            duplicates += 1
            continue
        seen.add(content)
        for bad in writer.forget(name, content):  # of what the file was before
            broken.discard(bad.image)
        wanted = [crop for crop in range(crops) if (content, crop) not in done]
        if not wanted or content in broken:
            continue
        try:
            image = images.decode(file)
        except images.BadImageError as error:
            writer.skip(Bad(name, content, None, _short(error, file, name)))
            continue
        for crop in wanted:
            writer.add(Record(content, name, crop), images.square(image, content, crop))
    writer.finish()
    if progress is not None:
        progress(len(files), len(files), writer.made)
    return duplicates


class ImageFeatures:
    """Features of a folder of images, made as they are asked for: a ``FeatureSource`` that stores nothing.

    Every image is decoded once at the start, so that a broken one is found before training begins.

    Args:
        folder: of images.
        encoder: makes the features.
        crops: records of each image, as in :func:`extract`.

    Attributes:
        bad: file -> why it was skipped.

    Raises:
        NoImagesError: no images, or none that can be decoded.
        ValueError: ``crops`` below 1.
    """

    def __init__(self, folder: Path, encoder: Encoder, crops: int = 1) -> None:
        _check_count("crops", crops)
        self.bad: dict[str, str] = {}
        self._encoder = encoder
        self._jobs = list(_jobs(folder, crops, self.bad))
        if not self._jobs:
            raise images.NoImagesError(
                f"no image in {folder} can be decoded: {next(iter(self.bad.values()))}"
            )
        self.images = [job.record.image for job in self._jobs]
        self.layer, self.fingerprint = encoder.layer, encoder.fingerprint
        self.tokens, self.width, self.unit = encoder.tokens, encoder.width, encoder.unit

    def __len__(self) -> int:
        return len(self._jobs)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """``[b, N, C]`` float16 of these records, in this order.

        Raises:
            BadImageError: a file that can't be decoded any more.
            EncoderError: an image that makes another number of tokens.
            ValueError: features beyond float16.
        """
        pictures = []
        for index in indices:
            record, file = self._jobs[index]
            pictures.append(images.square(images.decode(file), record.image, record.crop))
        features = self._encoder(pictures)
        for index, finite in zip(indices, features.isfinite().flatten(1).all(1).tolist(), strict=True):
            if not finite:
                raise ValueError(_beyond(str(self._jobs[index].file)))
        return features


def _jobs(folder: Path, crops: int, bad: dict[str, str]) -> Iterator[_Job]:
    seen: set[str] = set()
    for file in images.find_images(folder):
        name = file.relative_to(folder).as_posix()
        try:
            content = images.digest(file)
            if content in seen:
                continue
            seen.add(content)
            images.decode(file)
        except images.BadImageError as error:
            bad[name] = _short(error, file, name)
            continue
        for crop in range(crops):
            yield _Job(Record(content, name, crop), file)


def _short(error: images.BadImageError, file: Path, name: str) -> str:
    """What is wrong with a file, by its name in the folder."""
    return str(error).replace(str(file), name)


def _check_count(name: str, value: object) -> None:
    if (as_int(value) or 0) < 1:
        raise ValueError(f"{name} must be an int >= 1; got {value!r}")


def _index(out: Path, encoder: Encoder) -> Index:
    """The index to go on with, or that of a new store.

    Raises:
        StoreError: see :func:`extract`.
    """
    index = Index.begun(out)
    if index is None:
        return Index(encoder.fingerprint, encoder.identity, encoder.layer, encoder.tokens, encoder.width)
    if index.fingerprint != encoder.fingerprint:
        names = sorted(set(index.encoder) | set(encoder.identity))
        differ = [name for name in names if index.encoder.get(name) != encoder.identity.get(name)]
        if "dtype" in differ:  # weights are digested in the dtype that they are computed in
            differ = [name for name in differ if name != "weights"]
        raise StoreError(
            f"{out} holds features of another encoder (different {', '.join(differ)}); features of "
            "different encoders can't be mixed: give another folder"
        )
    return index


class _Writer:
    """Pictures into batches, batches into shards: cut at the same records however often a run dies.

    Attributes:
        made: records computed so far.
    """

    def __init__(
        self, out: Path, encoder: Encoder, index: Index, batch: int, shard_bytes: int, most: int
    ) -> None:
        self.made = 0
        self._out, self._encoder, self._index, self._batch = out, encoder, index, batch
        records = max(1, shard_bytes // (index.tokens * index.width * 2))
        self._rows = torch.empty(min(records, most), index.tokens, index.width, dtype=torch.float16)
        self._records: list[Record] = []
        self._waiting: list[tuple[Record, Image]] = []

    def add(self, record: Record, picture: Image) -> None:
        """One more."""
        self._waiting.append((record, picture))
        # A batch never straddles two shards: after a restart the same images are computed together.
        room = len(self._rows) - len(self._records)
        if len(self._waiting) == min(self._batch, room):
            self._compute()
        if len(self._records) == len(self._rows):
            self._flush()

    def skip(self, bad: Bad) -> None:
        """Note what can't be used."""
        if bad not in self._index.bad:
            self._index.bad.append(bad)

    def forget(self, name: str, content: str) -> list[Bad]:
        """Drop what is noted of a file whose content was another; returns it."""
        gone = [bad for bad in self._index.bad if bad.path == name and bad.image != content]
        self._index.bad = [bad for bad in self._index.bad if bad not in gone]
        return gone

    def finish(self) -> None:
        """Write what is left."""
        if self._waiting:
            self._compute()
        if self._records:
            self._flush()
        else:
            self._index.write(self._out)

    def _compute(self) -> None:
        features = self._encoder([picture for _, picture in self._waiting])
        for (record, _), row in zip(self._waiting, features, strict=True):
            if bool(row.isfinite().all()):
                self._rows[len(self._records)] = row
                self._records.append(record)
            else:
                self.skip(Bad(record.path, record.image, record.crop, _beyond(record.path)))
        self.made += len(self._waiting)
        self._waiting.clear()

    def _flush(self) -> None:
        count = len(self._index.shards)
        shard = write_shard(self._out, count, self._rows[: len(self._records)], self._records)
        self._index.shards.append(shard)
        self._index.write(self._out)
        self._records = []


def _beyond(name: str) -> str:
    return f"{name}: its features are NaN or beyond float16"
