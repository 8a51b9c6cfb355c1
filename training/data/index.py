"""The index: where each sample's members lie in which shard, as one mappable array per split."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from training.errors import DataError

DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("image_size", "<u4"),
        ("json_size", "<u4"),
        ("image_offset", "<u8"),
        ("json_offset", "<u8"),
        ("sha256_prefix", "<u8"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("direct", "u1"),
    ]
)
"""One sample: 45 bytes.

``sha256_prefix`` is the first eight bytes of the picture's sha256, big end first; ``width`` and ``height`` are pixels
once the picture is upright; ``direct`` is 1 where the fastest decoder may have it (see ``decode.Facts``).
"""

_MEND = "build the data set again with --force"


class IndexWriter:
    """Appends records to a ``.npy`` file, so that an index never has to fit in memory.

    Args:
        path: the file to write.
        dtype: of a record.
    """

    def __init__(self, path: Path, dtype: np.dtype = DTYPE) -> None:
        self.count = 0
        self._dtype = dtype
        self._file = path.open("wb")
        self._header()

    def _header(self) -> None:
        self._file.seek(0)
        # numpy leaves room for the first dimension to grow, so that the final header has the first one's length
        facts = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, facts)

    def append(self, record: tuple[int, ...]) -> None:
        """One sample, the fields in the order of the type."""
        self._file.write(np.array(record, dtype=self._dtype).tobytes())
        self.count += 1

    def extend(self, records: np.ndarray) -> None:
        """Many samples, of the type."""
        self._file.write(records.astype(self._dtype, copy=False).tobytes())
        self.count += len(records)

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._header()
        self._file.close()


def read_index(path: Path, count: int, dtype: np.dtype = DTYPE) -> np.ndarray:
    """The mapped index.

    Args:
        path: a ``.npy`` file of records; pickled arrays are refused.
        count: how many records the manifest promises.
        dtype: of a record.

    Raises:
        DataError: missing, of another type, or of another length.
    """
    try:
        index: np.ndarray = np.load(path, mmap_mode="r" if count else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            "The index of the data set cannot be read.", value=str(path), rule=str(error), mend=_MEND
        ) from error
    if index.dtype != dtype or index.shape != (count,):
        raise DataError(
            "The index does not belong to this data set.",
            value=f"{index.dtype} {index.shape}",
            rule=f"{count} records of the index's own type",
            mend=_MEND,
        )
    return index
