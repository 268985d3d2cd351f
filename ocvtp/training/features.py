"""Features of a folder of images: stored, or made as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ocvtp import images
from ocvtp.training.encoder import FeatureEncoder
from ocvtp.training.store import INDEX, Bad, Index, Record, Shard, StoreError, write_shard

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
    encoder: FeatureEncoder,
    out: Path,
    *,
    crops: int = 1,
    batch: int = DEFAULT_BATCH,
    shard_mb: int = DEFAULT_SHARD_MB,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        shard_mb: size of a file, in 10**6 bytes.
        limit: take the first so many images only.
        progress: called with images done and images in all.

    Raises:
        StoreError: ``out`` holds something else, or features of another encoder, layer or preprocessing.
        ValueError: no images, none that can be used, or a number that makes no sense.
    """
    for name, value in (("crops", crops), ("batch", batch), ("shard_mb", shard_mb), ("limit", limit)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an int >= 1; got {value!r}")
    files = images.find_images(folder)[:limit]
    index = _open(out, encoder)
    writer = _Writer(out, encoder, index, batch, shard_mb * 10**6)
    done = {(record.image, record.crop) for shard in index.shards for record in shard.records}
    seen: set[str] = set()
    before, duplicates = len(done), 0
    for number, file in enumerate(files):
        name = file.relative_to(folder).as_posix()
        if progress is not None:
            progress(number, len(files))
        content = images.digest(file)
        if content in seen:
            duplicates += 1
            continue
        seen.add(content)
        wanted = [crop for crop in range(crops) if (content, crop) not in done]
        known = index.bad.get(name)
        if wanted and (known is None or known.image != content):
            try:
                image = images.decode(file)
            except images.BadImageError as error:
                writer.skip(name, content, str(error).replace(str(file), name))
                continue
            index.bad.pop(name, None)  # another file of that name was bad
            for crop in wanted:
                writer.add(Record(content, name, crop), images.square(image, content, crop))
    writer.finish()
    if progress is not None:
        progress(len(files), len(files))
    total = sum(len(shard.records) for shard in index.shards)
    if total == 0:
        reasons = "; ".join([bad.reason for bad in index.bad.values()][:3])
        raise ValueError(f"none of the {len(files)} images in {folder} can be used: {reasons}")
    return Extracted(total - before, total, {name: bad.reason for name, bad in index.bad.items()}, duplicates)


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
        ValueError: no images, or none that can be decoded.
    """

    def __init__(self, folder: Path, encoder: FeatureEncoder, crops: int = 1) -> None:
        self.bad: dict[str, str] = {}
        self._encoder = encoder
        self._jobs = list(_jobs(folder, crops, self.bad))
        if not self._jobs:
            raise ValueError(f"no image in {folder} can be decoded: {next(iter(self.bad.values()))}")
        self.images = [job.record.image for job in self._jobs]
        self.layer, self.fingerprint = encoder.layer, encoder.fingerprint
        _, self.tokens, self.width = self.batch([0]).shape

    def __len__(self) -> int:
        return len(self._jobs)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """``[b, N, C]`` float16 of these records, in this order.

        Raises:
            ValueError: a file that can't be decoded any more, or features beyond float16.
        """
        pictures = []
        for index in indices:
            record, file = self._jobs[index]
            pictures.append(images.square(images.decode(file), record.image, record.crop))
        features = self._encoder(pictures)
        for index, finite in zip(indices, features.isfinite().flatten(1).all(1).tolist(), strict=True):
            if not finite:
                raise ValueError(f"{self._jobs[index].file}: its features are NaN or beyond float16")
        return features


def _jobs(folder: Path, crops: int, bad: dict[str, str]) -> Iterator[_Job]:
    seen: set[str] = set()
    for file in images.find_images(folder):
        content = images.digest(file)
        if content in seen:
            continue
        seen.add(content)
        name = file.relative_to(folder).as_posix()
        try:
            images.decode(file)
        except images.BadImageError as error:
            bad[name] = str(error).replace(str(file), name)
            continue
        for crop in range(crops):
            yield _Job(Record(content, name, crop), file)


def _open(out: Path, encoder: FeatureEncoder) -> Index:
    """The index to go on with, or that of a new store.

    Raises:
        StoreError: see :func:`extract`.
    """
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; give a folder")
    if not (out / INDEX).exists():
        # What a run leaves that died before its first index may be overwritten; anything else may not.
        foreign = [path for path in out.glob("*") if not path.name.startswith("features-00000.safetensors")]
        if foreign and not all(path.name.startswith(INDEX) for path in foreign):
            raise StoreError(f"{out} holds other things ({foreign[0].name}, ...); give an empty folder")
        out.mkdir(parents=True, exist_ok=True)
        return Index(encoder.fingerprint, encoder.identity, encoder.layer, tokens=0, width=encoder.width)
    index = Index.read(out)
    if index.fingerprint != encoder.fingerprint:
        names = sorted(set(index.encoder) | set(encoder.identity))
        differ = [name for name in names if index.encoder.get(name) != encoder.identity.get(name)]
        raise StoreError(
            f"{out} holds features of another encoder (different {', '.join(differ)}); features of "
            "different encoders can't be mixed: give another folder"
        )
    return index


class _Writer:
    """Pictures into batches, batches into shards: cut at the same records however often a run dies."""

    def __init__(
        self, out: Path, encoder: FeatureEncoder, index: Index, batch: int, shard_bytes: int
    ) -> None:
        self._out, self._encoder, self._index, self._batch = out, encoder, index, batch
        self._shard_bytes = shard_bytes
        self._waiting: list[tuple[Record, images.Image]] = []
        self._records: list[Record] = []
        self._rows: list[torch.Tensor] = []

    def add(self, record: Record, picture: images.Image) -> None:
        """One more."""
        self._waiting.append((record, picture))
        # A batch never straddles two shards: after a restart the same images are computed together.
        if len(self._waiting) == min(self._batch, self._room()):
            self._compute()
        if self._records and self._room() <= 0:
            self._flush()

    def skip(self, name: str, content: str, reason: str) -> None:
        """Note a file that can't be used."""
        self._index.bad[name] = Bad(content, reason)

    def finish(self) -> None:
        """Write what is left."""
        if self._waiting:
            self._compute()
        if self._records:
            self._flush()
        else:
            self._index.write(self._out)

    def _room(self) -> int:
        """Records that the shard can still take; before the size of one is known, as many as a batch."""
        if not self._index.tokens:
            return self._batch
        most = max(1, self._shard_bytes // (self._index.tokens * self._index.width * 2))
        return most - len(self._records)

    def _compute(self) -> None:
        features = self._encoder([picture for _, picture in self._waiting])
        tokens = features.shape[1]
        if not self._index.tokens:
            self._index.tokens = tokens
        if tokens != self._index.tokens:
            raise ValueError(
                f"{self._waiting[0][0].path} has {tokens} tokens, images before it {self._index.tokens}: all "
                "must have as many, so the processor has to make one size of them"
            )
        for (record, _), row in zip(self._waiting, features, strict=True):
            if bool(row.isfinite().all()):
                self._records.append(record)
                self._rows.append(row)
            else:
                self.skip(record.path, record.image, f"{record.path}: its features are NaN or beyond float16")
        self._waiting.clear()

    def _flush(self) -> None:
        shard: Shard = write_shard(self._out, len(self._index.shards), torch.stack(self._rows), self._records)
        self._index.shards.append(shard)
        self._index.write(self._out)
        self._records, self._rows = [], []
