"""One input of a build: what it is called, where its bytes are, and what is known about it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from training.data.captions import MAX_SIDECAR_BYTES, Fields, merged, sidecar_fields
from training.data.clean import CleanConfig, too_many_bytes
from training.data.clean.consent import ConsentConfig, OptOuts, licence, opted_out
from training.data.download_config import DownloadConfig
from training.data.entries import Entry, read_together
from training.data.findings import Finding, RefusedError
from training.data.rows import Cell


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture in a cell of a Parquet file."""

    file: Entry
    cell: Cell


@dataclass(frozen=True, slots=True)
class Linked:
    """A picture behind a URL."""

    url: str
    download: DownloadConfig


@dataclass(frozen=True, slots=True)
class Item:
    """One input: a picture that can be fetched, or something that was refused by name. It is small, and pickles.

    Attributes:
        name: the ledger's name for it, unique but for a manifest's rows that name a picture twice.
        image: where the encoded picture is; None where there is a finding.
        text: its ``.txt`` sidecar.
        json: its ``.json`` sidecar.
        label: its ``.cls`` sidecar.
        fields: what its row in a manifest says, laid over the sidecars; a picture with five rows is five inputs.
        defaults: what its folders' names say, laid under everything.
        finding: why it is refused already.
    """

    name: str
    image: Entry | Embedded | Linked | None = None
    text: Entry | None = None
    json: Entry | None = None
    label: Entry | None = None
    fields: Mapping[str, Any] | None = None
    defaults: Mapping[str, Any] | None = None
    finding: Finding | None = None

    def fetch(self, config: CleanConfig) -> tuple[bytes, Fields]:
        """The encoded picture and what is known about it.

        Raises:
            RefusedError: too large, unreadable, not to be had, or with a damaged sidecar.
            StorageError: a bucket does not answer, which is no news about this picture.
        """
        if self.finding is not None or self.image is None:
            raise RefusedError(self.finding or Finding("missing_file"))
        try:
            data, beside = self._read(self.image, config)
            found = sidecar_fields(*beside)
        except FileNotFoundError as error:
            raise RefusedError(Finding("missing_file", detail="no such file")) from error
        except OSError as error:
            raise RefusedError(Finding("unreadable", detail=f"{error.strerror or error}"[:200])) from error
        known = found if self.fields is None else merged(found, self.fields)
        return data, {**self.defaults, **known} if self.defaults else known

    def _read(self, image: Entry | Embedded | Linked, config: CleanConfig) -> tuple[bytes, list[bytes | None]]:
        """The picture and the sidecars, once their sizes were looked at."""
        sidecars = [self.text, self.json, self.label]
        if not isinstance(image, Entry):
            return _read_elsewhere(image, dict(self.fields or {}), config), []
        _require_few(image.now_size(), config)
        for entry in sidecars:
            if entry is not None and entry.now_size() > MAX_SIDECAR_BYTES:
                detail = f"{entry.name} is too large"
                raise RefusedError(Finding("bad_sidecar", entry.now_size(), MAX_SIDECAR_BYTES, detail))
        return read_together(image, sidecars)


def _read_elsewhere(image: Embedded | Linked, fields: Fields, config: CleanConfig) -> bytes:
    if isinstance(image, Linked):
        from training.data.download import download

        opt_outs = _opt_outs(config.consent)
        finding = licence(fields, config.consent) or opted_out(fields, opt_outs)
        if finding is not None:  # who opted out is not even asked
            raise RefusedError(finding)
        refusal = lambda url: opted_out({"url": url}, opt_outs)  # noqa: E731
        return download(image.url, image.download, config.size.max_bytes, refusal)
    data: bytes | None = _column(os.getpid(), image.file, image.cell.group, image.cell.column).read(image.cell.row)
    if data is None:
        raise RefusedError(Finding("missing_file", detail="the cell is null"))
    _require_few(len(data), config)
    return data


def _require_few(size: int, config: CleanConfig) -> None:
    excess = too_many_bytes(size, config.size)
    if excess is not None:
        raise RefusedError(excess)


@lru_cache(maxsize=2)
def _opt_outs(config: ConsentConfig) -> OptOuts:
    return OptOuts.read(config)


@lru_cache(maxsize=2)
def _column(_process: int, file: Entry, group: int, column: str) -> Any:
    """The pictures of a row group; the last two stay open, for items come in order."""
    from training.data.parquet_rows import PictureColumn, open_parquet

    return PictureColumn(open_parquet(file.name, file.open()), group, column)
