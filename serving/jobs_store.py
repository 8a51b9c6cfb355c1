"""Jobs as files in a folder that replicas share: every change is one rename, link or append, so a kill leaves no half.

What is in it:

- ``active/JOB``: empty; the job is not settled, so somebody must care for it
- ``idempotency/HASH``: which job an idempotency key made, and of what body
- ``JOB/record.json``: what was asked; written once
- ``JOB/start.png``, ``mask.png``: the picture to start from
- ``JOB/attempt-N``: the N-th replica to work on it; its time says when that was last alive
- ``JOB/state.json``: how far it is
- ``JOB/events.jsonl``: what happened, a line each
- ``JOB/image-I``: the file of a finished image
- ``JOB/cancel``: somebody wants it to end
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from serving.jobs_record import JOBS, JobRecord, JobState, is_id
from serving.jobs_schemas import JobImage
from serving.schemas import StartImage


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job.

    Attributes:
        number: from 1; what ``Last-Event-ID`` counts by.
        kind: the event's name.
        data: JSON.
    """

    number: int
    kind: str
    data: str


class JobStore:
    """The folder. Its methods block on the disk: call them on a thread.

    Args:
        folder: made if it is not there; nobody but its owner may read it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._active = folder / "active"
        for each in (folder, self._active):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)

    def create(self, record: JobRecord, start: StartImage | None, state: JobState) -> None:
        """Keep a new job; it is there as a whole or not at all."""
        aside = self.folder / f".new-{record.id}"
        aside.mkdir(mode=0o700)
        (aside / "record.json").write_text(record.model_dump_json(exclude={"request": {"start"}}))
        (aside / "state.json").write_text(state.model_dump_json())
        if start is not None:
            start.image.save(aside / "start.png")
            if start.mask is not None:
                start.mask.save(aside / "mask.png")
        aside.rename(self.folder / record.id)
        (self._active / record.id).touch()

    def record(self, job_id: str) -> JobRecord | None:
        """What was asked; None where there is no such job."""
        text = self._text(job_id, "record.json")
        return None if text is None else JobRecord.model_validate_json(text)

    def pictures(self, record: JobRecord) -> tuple[Image.Image | None, Image.Image | None]:
        """The picture to start from and its mask."""
        if record.strength is None:
            return None, None
        place = self.folder / record.id
        start = Image.open(place / "start.png").convert("RGB")
        return start, Image.open(place / "mask.png").convert("L") if record.masked else None

    def state(self, job_id: str) -> JobState | None:
        """How far it is; None where there is no such job."""
        text = self._text(job_id, "state.json")
        return None if text is None else JobState.model_validate_json(text)

    def write_state(self, job_id: str, state: JobState) -> None:
        """Replace how far it is; a settled job needs nobody's care any more."""
        _replace(self.folder / job_id / "state.json", state.model_dump_json().encode())
        if state.settled:
            (self._active / job_id).unlink(missing_ok=True)

    def add_image(self, job_id: str, index: int, seed: int, file: bytes) -> JobImage:
        """Keep the file of a finished image."""
        _replace(self.folder / job_id / f"image-{index}", file)
        url = f"{JOBS}/{job_id}/images/{index}"
        return JobImage(index=index, seed=seed, url=url, bytes=len(file), sha256=hashlib.sha256(file).hexdigest())

    def image(self, job_id: str, index: int) -> bytes | None:
        """The file of a finished image."""
        return _bytes(self.folder / job_id / f"image-{index}") if is_id(job_id) else None

    def tell(self, job_id: str, kind: str, data: dict[str, Any]) -> None:
        """Append an event."""
        line = json.dumps({"event": kind, "data": data}) + "\n"
        descriptor = os.open(self.folder / job_id / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def events(self, job_id: str, after: int) -> list[JobEvent]:
        """What happened after the event of that number."""
        lines = (_bytes(self.folder / job_id / "events.jsonl") or b"").split(b"\n")[:-1]  # a whole line ends
        told = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if number > after]
        return [JobEvent(number, each["event"], json.dumps(each["data"])) for number, each in told]

    def cancel(self, job_id: str) -> None:
        """Remember that somebody wants it to end."""
        (self.folder / job_id / "cancel").touch()

    def cancelling(self, job_id: str) -> bool:
        """Whether somebody wants it to end."""
        return (self.folder / job_id / "cancel").exists()

    def active(self) -> list[str]:
        """The jobs that are not settled."""
        return sorted(entry.name for entry in os.scandir(self._active) if is_id(entry.name))

    def all(self) -> Iterator[str]:
        """All jobs."""
        return (entry.name for entry in os.scandir(self.folder) if is_id(entry.name))

    def bytes_of(self, job_id: str) -> int:
        """What a job takes on the disk."""
        try:
            return sum(entry.stat().st_size for entry in os.scandir(self.folder / job_id))
        except FileNotFoundError:  # removed meanwhile
            return 0

    def remove(self, job_id: str) -> None:
        """Forget a job; of several replicas that do, one does."""
        (self._active / job_id).unlink(missing_ok=True)
        aside = self.folder / f".old-{job_id}-{secrets.token_hex(4)}"
        try:
            (self.folder / job_id).rename(aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside)

    def _text(self, job_id: str, name: str) -> str | None:
        found = _bytes(self.folder / job_id / name) if is_id(job_id) else None
        return None if found is None else found.decode()


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    aside.write_bytes(content)
    aside.replace(path)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
