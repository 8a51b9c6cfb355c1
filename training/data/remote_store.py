"""Objects of a bucket, through fsspec: S3 by s3fs, Google Cloud Storage by gcsfs, the Hugging Face Hub by its own."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from training.data.remote_errors import MENDS, is_refusal, plain_words
from training.data.store import Stored
from training.errors import StorageError

PROTOCOLS = ("s3", "gs", "hf", "memory")
"""``memory`` lives in one process; only tests use it."""

_log = logging.getLogger(__name__)
_PAUSES_S = (0.2, 1.0, 3.0)
"""Pauses before a request without an answer is sent again."""
_PATIENT = {"gs"}
"""Libraries that ask six times within half a minute by themselves."""
_ANSWER_S = 60.0
"""Within this a small request is answered or given up, so that storage that hangs is found out."""

_Result = TypeVar("_Result")

_SETTINGS = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_", "FSSPEC_")
"""How the environment variables begin that say where a storage is and who asks."""

_filesystems: dict[tuple[int, str, int], Any] = {}
"""One per process, protocol and settings. Kept even in a forked child, which must not use its parent's: their end
would wait for the parent's event loop and close the parent's sockets."""


def filesystem(protocol: str) -> Any:
    """This process's fsspec file system; where the storage is and who asks is what the environment says now."""
    settings = hash(tuple(sorted(pair for pair in os.environ.items() if pair[0].startswith(_SETTINGS))))
    key = (os.getpid(), protocol, settings)
    known = _filesystems.get(key)
    if known is not None:
        return known
    made = _made(protocol)
    # a file system of threads, and not of an event loop, is made for one thread: fsspec finds each its own
    return _filesystems.setdefault(key, made) if made.async_impl else made


def _made(protocol: str) -> Any:
    import fsspec

    if protocol == "s3":
        retries = {"mode": "standard", "total_max_attempts": 2}
        patience = {"retries": retries, "connect_timeout": 5, "read_timeout": 20}
        return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=patience)
    if protocol == "gs":
        # the class below the one that fsspec names asks no second service what kind of bucket it is
        from gcsfs.core import GCSFileSystem

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises, too
        return GCSFileSystem(skip_instance_cache=True, use_listings_cache=False, requests_timeout=20)
    return fsspec.filesystem(protocol, use_listings_cache=False)


class RemoteStore:
    """A folder of a bucket.

    Args:
        protocol: one of ``PROTOCOLS``.
        path: the bucket and the folder in it, with ``/``.
    """

    def __init__(self, protocol: str, path: str) -> None:
        self._protocol = protocol
        self._path = path

    def read(self, name: str) -> bytes:
        """See ``Folder``."""
        data: bytes = self._patiently(name, lambda ask: ask("cat_file", self._at(name), limit_s=None))
        return data

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """See ``Folder``."""

        def ranged(ask: Callable[..., Any]) -> bytes:
            try:
                data: bytes = ask("cat_file", self._at(name), start=start, end=start + size)
            except Exception as error:
                # servers refuse a range that starts beyond the end
                if isinstance(error, FileNotFoundError | PermissionError) or not is_refusal(error):
                    raise
                if start < ask("info", self._at(name))["size"]:
                    raise
                return b""
            return data

        return self._patiently(name, ranged)

    def stat(self, name: str) -> Stored:
        """See ``Folder``; a prefix of other names is no file."""
        facts = self._patiently(name, lambda ask: ask("info", self._at(name)))
        if facts["type"] != "file":
            raise FileNotFoundError(f"{self._url(name)} is no file")
        return _stored(name, facts)

    def write(self, name: str, data: bytes) -> None:
        """See ``Folder``; stores show an object once all of it has arrived."""
        self._patiently(name, lambda ask: ask("pipe_file", self._at(name), data, limit_s=None))

    def upload(self, path: Path, name: str) -> None:
        """See ``Folder``."""
        size = path.stat().st_size

        def put(ask: Callable[..., Any]) -> None:
            ask("put_file", str(path), self._at(name), limit_s=None)
            stored = ask("info", self._at(name))["size"]
            if stored != size:
                raise OSError(f"{stored} of {size} bytes arrived")

        self._patiently(name, put)

    def download(self, name: str, path: Path) -> None:
        """See ``Folder``."""
        from training.data.local_store import written

        def get(ask: Callable[..., Any]) -> None:
            size = ask("info", self._at(name))["size"]
            with written(path) as file:
                ask("get_file", self._at(name), file.name, limit_s=None)
                arrived = Path(file.name).stat().st_size
                if arrived != size:
                    raise OSError(f"{arrived} of {size} bytes arrived")

        path.parent.mkdir(parents=True, exist_ok=True)
        self._patiently(name, get)

    def files(self, prefix: str) -> Iterator[Stored]:
        """See ``Folder``; the listing is read as a whole."""
        folder = prefix.rpartition("/")[0]
        top = f"{self._path}/{folder}".rstrip("/")
        found = self._patiently(prefix, lambda ask: ask("find", top, detail=True, limit_s=None))
        start = len(self._path.strip("/")) + 1
        for place in sorted(found):
            name = place.strip("/")[start:] if self._path else place.strip("/")
            if name.startswith(prefix) and name and found[place]["type"] == "file":
                yield _stored(name, found[place])

    def remove(self, name: str) -> None:
        """See ``Folder``."""
        try:
            self._patiently(name, lambda ask: ask("rm_file", self._at(name)))
        except FileNotFoundError:
            return

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _url(self, name: str) -> str:
        return f"{self._protocol}://{self._path}/{name}"

    def _patiently(self, name: str, request: Callable[[Callable[..., Any]], _Result]) -> _Result:
        pauses_s = iter(() if self._protocol in _PATIENT else _PAUSES_S)
        while True:
            try:
                return request(self._ask)
            except FileNotFoundError as error:
                self._require_bucket(name)
                raise FileNotFoundError(f"{self._url(name)} is not there") from error
            except Exception as error:  # each library has errors of its own; all are reported
                pause_s = None if is_refusal(error) else next(pauses_s, None)
                if pause_s is None:
                    raise self._failed(name, error) from error
                _log.warning("%s is asked again: %s", self._url(name), plain_words(error))
                time.sleep(pause_s)

    def _ask(self, method: str, *args: Any, limit_s: float | None = _ANSWER_S, **options: Any) -> Any:
        files = filesystem(self._protocol)
        if not files.async_impl:
            return getattr(files, method)(*args, **options)
        from fsspec.asyn import sync

        return sync(files.loop, getattr(files, f"_{method}"), *args, timeout=limit_s, **options)

    def _require_bucket(self, name: str) -> None:
        """A file that is missing in a bucket that is missing is no news about the file."""
        parts = self._path.split("/")
        depth = {"s3": 1, "gs": 1, "hf": 3 if parts[0] in {"datasets", "spaces"} else 2}.get(self._protocol, 0)
        if not depth:
            return
        try:
            self._ask("info", "/".join(parts[:depth]))
        except FileNotFoundError as error:
            answer = f"there is no {'/'.join(parts[:depth])}, or not for these credentials"
            raise self._failed(name, error, answer) from error
        except Exception as error:  # noqa: BLE001  # who may read objects need not be allowed to ask for the bucket
            _log.debug("the bucket of %s does not answer: %s", self._url(name), plain_words(error))

    def _failed(self, name: str, error: Exception, answer: str = "") -> StorageError:
        refused = bool(answer) or is_refusal(error)
        return StorageError(
            "Storage refuses." if refused else "Storage does not answer.",
            value=self._url(name),
            rule=answer or plain_words(error),
            mend=MENDS.get(self._protocol),
        )


def _stored(name: str, facts: dict[str, Any]) -> Stored:
    stamps = (facts.get(key) for key in ("ETag", "etag", "blob_id", "generation", "updated", "created"))
    return Stored(name, int(facts["size"] or 0), str(next((stamp for stamp in stamps if stamp), "")).strip('"'))
