"""Who asked for what and how it ended: JSON lines, one for each request that reached the model or was refused there."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import socket
import threading
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from serving.audit_config import AuditConfig
from serving.caller import Caller
from serving.model import ModelCard
from serving.schemas import GenerationRequest

Outcome = Literal["done", "refused", "cancelled", "failed"]
"""How a request ended: with all its images, by a rule or a check, given up by its client, or lost."""
_WAITING = 10_000
"""Lines that wait for a slow disk; what comes then is lost, and counted."""

log = logging.getLogger(__name__)


class AuditLine(BaseModel):
    """One line."""

    model_config = ConfigDict(frozen=True)

    time_utc: str
    """When it ended, ISO 8601."""
    request_id: str
    """As the response's ``x-request-id`` has it."""
    key: str | None
    """The name of the API key, never the key."""
    dialect: str
    """The API that was spoken."""
    model: str
    """``name/version``."""
    bundle_sha256: str
    """The model's weights."""
    adapter: str | None
    """The LoRA on top of it."""
    seed: int
    """Of the first image."""
    images: int
    """How many were asked for."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    steps: int
    """Denoising steps of each."""
    sampler: str
    """How they were denoised."""
    edit: bool
    """Whether they start from a picture."""
    outcome: Outcome
    """How it ended."""
    reason: str | None
    """The kind of what refused or lost it."""
    seconds: float
    """How long it took."""
    prompt_sha256: str
    """The prompt's checksum, UTF-8."""
    prompt: str | None = None
    """The prompt, where the config says so."""
    negative_prompt: str | None = None
    """What the images should not show, where the config says so."""


class AuditLog:
    """Writes lines on its own thread. A disk that fails costs lines, which are counted, and never a request.

    Args:
        config: where, and how much.
        card: the model.
    """

    def __init__(self, config: AuditConfig, card: ModelCard) -> None:
        self.lost = 0
        self.written = 0
        self._config = config
        self._card = card
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._config.directory is not None:
            folder = Path(self._config.directory).expanduser()
            self._thread = threading.Thread(target=self._write_all, args=(folder,), name="audit", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join()
            self._thread = None

    def write(
        self, request: GenerationRequest, caller: Caller, outcome: Outcome, *, seconds: float, reason: str | None = None
    ) -> None:
        """Remember how a request ended; returns at once and raises nothing.

        Args:
            request: what was asked.
            caller: who asked.
            outcome: how it ended.
            seconds: how long it took.
            reason: what refused or lost it.
        """
        if self._thread is None:
            return
        line = AuditLine(
            time_utc=datetime.now(UTC).isoformat(timespec="milliseconds"),
            request_id=caller.request_id,
            key=caller.key,
            dialect=caller.dialect,
            model=self._card.names[-1],
            bundle_sha256=self._card.bundle_sha256,
            **request.model_dump(include={"adapter", "seed", "images", "width", "height", "steps", "sampler"}),
            edit=request.start is not None,
            outcome=outcome,
            reason=reason,
            seconds=round(seconds, 3),
            prompt_sha256=hashlib.sha256(request.prompt.encode()).hexdigest(),
            prompt=request.prompt if self._config.prompts else None,
            negative_prompt=request.negative_prompt if self._config.prompts else None,
        )
        shown = line.model_dump_json(exclude=None if self._config.prompts else {"prompt", "negative_prompt"})
        try:
            self._lines.put_nowait(shown)
        except queue.Full:
            self._lose("lines come faster than the disk takes them")

    def _write_all(self, folder: Path) -> None:
        file: _Rotating | None = None
        while (line := self._lines.get()) is not None:
            try:
                file = file or _Rotating(folder, self._config)
                file.write(line)
                self.written += 1
            except OSError as error:
                self._lose(f"{type(error).__name__}: {error.strerror}")
                if file is not None:
                    file.closed()
                file = None
        if file is not None:
            file.closed()

    def _lose(self, why: str) -> None:
        """Count a line that is lost; the log says so at the first, the second, the fourth, ..."""
        with self._lock:
            self.lost += 1
            lost = self.lost
        if lost & (lost - 1) == 0:
            log.error("the audit log has lost %d lines: %s", lost, why)


class _Rotating(RotatingFileHandler):
    """A series of files; unlike its base it raises what the disk says."""

    def __init__(self, folder: Path, config: AuditConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._max_files = config.max_files
        name = folder / f"audit-{socket.gethostname()}-{os.getpid()}.jsonl"
        super().__init__(name, maxBytes=config.max_file_bytes, backupCount=config.max_files - 1, encoding="utf-8")
        self._prune()

    def write(self, line: str) -> None:
        """Append a line, to a new file where this one is full."""
        record = logging.makeLogRecord({"msg": line})
        if self.shouldRollover(record):
            self.doRollover()
            self._prune()
        if self.stream is None:
            self.stream = self._open()
        self.stream.write(f"{line}\n")
        self.stream.flush()

    def closed(self) -> None:
        """Close the file; what it still holds back cannot be saved."""
        try:
            self.close()
        except OSError as error:
            log.warning("the audit log's file does not close: %s", error.strerror)

    def _prune(self) -> None:
        """Keep to the number of files, whoever wrote them."""
        files = sorted(self._folder.glob("audit-*.jsonl*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[self._max_files :]:
            if path != Path(self.baseFilename):
                path.unlink(missing_ok=True)
