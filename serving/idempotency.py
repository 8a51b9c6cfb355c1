"""The same request sent twice makes one job: ``Idempotency-Key``, as Stripe and OpenAI's clients know it."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from serving.envelope import ApiError

HEADER = "idempotency-key"
_MAX_CHARACTERS = 255


@dataclass(frozen=True)
class Made:
    """What a key was used for.

    Attributes:
        job_id: the job that it made.
        body_sha256: of the body that it came with.
    """

    job_id: str
    body_sha256: str


class IdempotencyKeys:
    """Which job each key made. The methods block on the disk.

    Args:
        folder: shared by all replicas.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def use(self, name: str, made: Made) -> Made:
        """Use a key: for this, unless it was used before.

        Args:
            name: as ``name_of`` gives it.
            made: what it shall stand for.

        Returns:
            What it stands for now.
        """
        aside = self._folder / f".{secrets.token_hex(8)}"
        aside.write_text(f"{made.job_id} {made.body_sha256}")
        try:
            os.link(aside, self._folder / name)
        except FileExistsError:
            return self.find(name) or self.use(name, made)
        finally:
            aside.unlink()
        return made

    def find(self, name: str) -> Made | None:
        """What a key stands for."""
        try:
            job_id, _, body_sha256 = (self._folder / name).read_text().partition(" ")
        except FileNotFoundError:
            return None
        return Made(job_id, body_sha256)

    def forget_orphan(self, name: str, after_s: float) -> None:
        """The key can be used anew if it is older: whoever used it died before there was a job."""
        try:
            used_s = (self._folder / name).stat().st_mtime
        except FileNotFoundError:
            return
        if time.time() - used_s > after_s:
            self.forget(name)

    def forget(self, name: str) -> None:
        """The key can be used anew."""
        (self._folder / name).unlink(missing_ok=True)


def name_of(given: str, owner: str | None) -> str:
    """The file of a client's key; other clients' equal keys have others.

    Raises:
        ApiError: it is empty, too long or not printable.
    """
    if not (0 < len(given) <= _MAX_CHARACTERS and given.isascii() and given.isprintable()):
        rule = f"1 to {_MAX_CHARACTERS} printable ASCII characters"
        message = f"Invalid value for the header 'Idempotency-Key'.\n  value:   {given[:80]!r}\n  rule:    {rule}"
        raise ApiError(400, message, param=HEADER, code="invalid_value")
    return hashlib.sha256(f"{owner or ''}\0{given}".encode()).hexdigest()


def require_same(made: Made, body_sha256: str) -> None:
    """Refuse a key that comes with another body.

    Raises:
        ApiError: it does.
    """
    if made.body_sha256 != body_sha256:
        message = (
            "This Idempotency-Key was used with another body.\n"
            f"  value:   it made {made.job_id}\n"
            "  rule:    one key, one request\n"
            "  mend:    send a new key with a new request"
        )
        raise ApiError(422, message, param=HEADER, code="idempotency_key_reused")
