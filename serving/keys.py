"""API keys: who may ask. Their secrets are nowhere, only their checksums are."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import ConfigError, UsageError

PREFIX = "dr_"
"""What every secret begins with, so that scanners for lost secrets know it."""
NAME = "[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
"""What a key can be called; fit for a file's name."""
_LOOK_S = 1.0
"""Age at which the file is looked at again."""

log = logging.getLogger(__name__)


class Quota(BaseModel):
    """How much one key may ask for; None does not count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images_per_minute: int | None = Field(default=None, ge=1)
    """Images, also all at once."""
    images_per_day: int | None = Field(default=None, ge=1)
    """Images."""
    megapixel_steps_per_day: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Work: rows (a guided image has two) times evaluations of the network times pixels / 1e6."""


class ApiKey(BaseModel):
    """One key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=f"^{NAME}$")
    """Whose it is; also the user's name where a client speaks basic authentication."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The checksum of the secret, which has 256 bits of its own: no salt or slow hash would add to it."""
    created_utc: str
    """When it was made, ISO 8601."""
    quota: Quota = Quota()
    """How much it may ask for."""
    priority_ceiling: int = Field(default=5, ge=0, le=9)
    """The most urgent priority that it may ask for; 0 is the most urgent."""


class KeyFile(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[ApiKey, ...] = ()
    """In the order in which they were made."""


def new_key(name: str, quota: Quota, priority_ceiling: int) -> tuple[ApiKey, str]:
    """A key and its secret, which is told this once.

    Args:
        name: whose it is.
        quota: how much it may ask for.
        priority_ceiling: the most urgent priority that it may ask for.

    Raises:
        UsageError: nobody can be called so.
    """
    if re.fullmatch(NAME, name) is None:
        rule = "at most 64 letters, digits, dots, dashes and underscores, beginning with a letter or digit"
        raise UsageError("A key cannot have this name.", value=name[:80], rule=rule)
    secret = PREFIX + secrets.token_urlsafe(32)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    key = ApiKey(name=name, sha256=_sha256(secret), created_utc=created, quota=quota, priority_ceiling=priority_ceiling)
    return key, secret


def read_keys(path: Path) -> KeyFile:
    """The keys of a file.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        mend = f"darkroom keys add NAME --file {path}"
        message = "The file of API keys cannot be read."
        raise ConfigError(message, value=str(path), rule=str(error), mend=mend) from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        rule = f"{place}: {first['msg']}" if place else first["msg"]
        raise ConfigError("The file of API keys is damaged.", value=str(path), rule=rule) from error


def write_keys(path: Path, keys: KeyFile) -> None:
    """Replace the file in one step; only its owner may read it."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(keys.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Keys:
    """The keys of a file, which is read again when it changes: a key that is taken out is refused a second later.

    Args:
        path: the file.

    Raises:
        ConfigError: it cannot be read now; later, the keys that are known go on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_s = time.monotonic()
        self._written = _written(path)
        self._take(read_keys(path))

    def find(self, secret: str) -> ApiKey | None:
        """The key with this secret."""
        self._look()
        return self._by_sha256.get(_sha256(secret))

    def _look(self) -> None:
        if time.monotonic() - self._looked_s < _LOOK_S:
            return
        self._looked_s = time.monotonic()
        written = _written(self._path)
        if written == self._written:
            return
        try:
            self._take(read_keys(self._path))
            self._written = written
        except ConfigError:
            log.exception("the keys known before go on")

    def _take(self, keys: KeyFile) -> None:
        self._by_sha256 = {key.sha256: key for key in keys.keys}


def _written(path: Path) -> tuple[int, int] | None:
    """When the file was written, and which it is; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()
