"""The rules over a whole set: copies and outliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from training.data.clean.config import CleanConfig
from training.data.clean.duplicates import exact_copies, near_copies
from training.data.clean.outliers import outlying
from training.data.clean.phash import THUMBNAIL_BYTES
from training.data.findings import Finding

if TYPE_CHECKING:
    import pyarrow as pa


def decide(table: pa.Table, config: CleanConfig, scores: Mapping[int, float] | None = None) -> dict[int, Finding]:
    """Judge inputs by each other; of copies, the input with the lowest number stays.

    In memory are, for each row, about 0.4 kB of hash and thumbnail, 60 to 250 bytes of index, and the table itself.

    Args:
        table: one row for each input that passed ``judge``, in any order: ``number`` int64, ``source`` str, ``sha256``
            binary(32), ``caption`` str, ``phash`` uint64 or null, ``thumbnail`` binary or null, ``features``
            list<float16> or null.
        config: the rules.
        scores: ``outlier_scores`` of the same, where they are known already.

    Returns:
        The refused inputs' numbers with the reason; the same for the same rows, whatever their order.
    """
    table = table.sort_by("number")
    numbers = table["number"].to_numpy()
    digests = table["sha256"].to_pylist()
    first = _first_rows(digests)
    refused: dict[int, Finding] = {}
    if config.duplicates.exact:
        pairs = exact_copies(digests, table["source"].to_pylist(), table["caption"].to_pylist())
        for row, earlier in pairs:
            refused[int(numbers[row])] = Finding(
                "exact_duplicate", detail=f"the same bytes as input {numbers[earlier]}", of=int(numbers[earlier])
            )
    by_picture = {**_near(table, first, config), **_outliers(table, first, config, scores)}
    for row, earlier in enumerate(first):
        finding = by_picture.get(earlier)
        if finding is not None:  # all captions of a picture share its fate
            refused.setdefault(int(numbers[row]), finding)
    return dict(sorted(refused.items()))


def _first_rows(digests: list[bytes]) -> list[int]:
    """For each row, the first one with the same bytes."""
    first: dict[bytes, int] = {}
    return [first.setdefault(digest, row) for row, digest in enumerate(digests)]


def _pictures(table: pa.Table, first: list[int], column: str) -> tuple[np.ndarray, pa.Table]:
    """The rows that are the first of their picture and have something in ``column``, and the table of these."""
    alone = np.asarray(first, np.int64) == np.arange(len(first))
    rows = np.flatnonzero(alone & table[column].is_valid().to_numpy())
    return rows, table.take(rows)


def _near(table: pa.Table, first: list[int], config: CleanConfig) -> dict[int, Finding]:
    import pyarrow as pa

    if not config.duplicates.near or not len(table):
        return {}
    rows, pictures = _pictures(table.select(["number", "phash", "thumbnail"]), first, "phash")
    thumbnails = pictures["thumbnail"].cast(pa.binary(THUMBNAIL_BYTES)).combine_chunks()
    raw = np.frombuffer(b"".join(bytes(chunk.buffers()[1]) for chunk in _chunks(thumbnails)), np.uint8)
    hashes, numbers = pictures["phash"].to_numpy(), pictures["number"].to_numpy()
    copies = near_copies(hashes, raw.reshape(-1, THUMBNAIL_BYTES), config.duplicates)
    found = {}
    for at in np.flatnonzero(copies.of >= 0):
        of = copies.of[at]
        bits = int(np.bitwise_count(hashes[at] ^ hashes[of]))
        difference, limit = int(copies.difference[at]), config.duplicates.max_difference
        detail = f"looks like input {numbers[of]}: {bits} bits of hash, {difference} of 255 steps of thumbnail"
        found[int(rows[at])] = Finding("near_duplicate", difference, limit, detail, of=int(numbers[of]))
    return found


def _chunks(array: pa.ChunkedArray | pa.Array) -> list[pa.Array]:
    return list(getattr(array, "chunks", [array]))


def _outliers(
    table: pa.Table, first: list[int], config: CleanConfig, scores: Mapping[int, float] | None
) -> dict[int, Finding]:
    if not config.outliers.enabled or not len(table):
        return {}
    scores = outlier_scores(table, config) if scores is None else scores
    limit = config.outliers.max_deviations
    numbers = table["number"].to_numpy()
    found = {}
    for row in sorted(set(first)):
        score = scores.get(int(numbers[row]))
        if score is not None and score > limit:
            found[row] = Finding("outlier", score, limit, f"{score:.1f} robust deviations from the rest > {limit:g}")
    return found


def outlier_scores(table: pa.Table, config: CleanConfig) -> dict[int, float]:
    """How far each input with features is from the rest, by number; in robust standard deviations.

    Args:
        table: as for ``decide``.
        config: the rules.
    """
    table = table.sort_by("number")
    rows, pictures = _pictures(table, _first_rows(table["sha256"].to_pylist()), "features")
    if not len(rows):
        return {}
    flat = pictures["features"].combine_chunks().flatten().to_numpy()
    scores = outlying(flat.reshape(len(rows), -1), pictures["sha256"].to_pylist(), config.outliers)
    return dict(zip(pictures["number"].to_pylist(), (float(score) for score in scores), strict=True))
