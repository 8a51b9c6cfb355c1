"""One job as it is on disk: what was asked, which never changes, and how far it is."""

from __future__ import annotations

import re
import secrets

from PIL import Image
from pydantic import BaseModel, ConfigDict

from serving.envelope import ErrorBody
from serving.images import OutputFormat
from serving.jobs_schemas import ENDS, JobImage, JobStatus, Status, WebhookStatus
from serving.schemas import GenerationRequest, StartImage

JOBS = "/v1/jobs"
_ID = re.compile(r"job_[0-9a-f]{24}")


def new_id() -> str:
    """A name that nobody can guess."""
    return f"job_{secrets.token_hex(12)}"


def is_id(text: str) -> bool:
    """Whether a job can have this name; what can is safe in a path."""
    return _ID.fullmatch(text) is not None


class JobRecord(BaseModel):
    """What was asked: enough to make the same pictures again, on any replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """The job's name."""
    key: str | None
    """The name of the API key that may see it; None is everybody."""
    created_s: float
    """When it was accepted, seconds since 1970."""
    model: str
    """Of the replica that accepted it, ``name/version``."""
    bundle_sha256: str
    """The model's weights: only replicas that have them make the same pictures."""
    request: GenerationRequest
    """Without the picture to start from, which is a file beside this one."""
    strength: float | None
    """Of the picture to start from; None starts from noise."""
    masked: bool
    """Whether there is a mask beside that picture."""
    output_format: OutputFormat
    """The images' file format."""
    quality: int | None
    """Of a lossy file."""
    webhook_url: str | None
    """Told of the job's end."""
    idempotency: str | None
    """Its file among the idempotency keys."""

    def asked(self, start: Image.Image | None, mask: Image.Image | None, now_s: float) -> GenerationRequest:
        """The request with its picture, and with what is left of its deadline.

        Args:
            start: RGB, of the request's size.
            mask: mode ``L``, of the request's size.
            now_s: seconds since 1970.
        """
        given = None if start is None or self.strength is None else StartImage(start, self.strength, mask)
        left_s = None
        if self.request.deadline_s is not None:
            left_s = max(0.001, self.created_s + self.request.deadline_s - now_s)
        return self.request.model_copy(update={"start": given, "deadline_s": left_s})

    @property
    def steps(self) -> int:
        """Denoising steps of all images together."""
        of_one = self.request.steps
        if self.strength is not None:
            of_one = max(1, round(self.strength * of_one))
        return of_one * self.request.images


class JobState(BaseModel):
    """How far it is; written by the replica that works on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Status = "queued"
    """Where it is."""
    steps_done: int = 0
    """Of all images together."""
    images: tuple[JobImage, ...] = ()
    """Those that are finished."""
    error: ErrorBody | None = None
    """Why it failed."""
    ended_s: float | None = None
    """When it ended, seconds since 1970."""
    webhook: WebhookStatus | None = None
    """Whether its end was told."""

    @property
    def ended(self) -> bool:
        """Whether nothing more is made."""
        return self.status in ENDS

    @property
    def settled(self) -> bool:
        """Whether nothing more is done."""
        return self.ended and self.webhook != "pending"

    def with_image(self, image: JobImage) -> JobState:
        """The same with one more image; one that was made before is replaced."""
        others = [each for each in self.images if each.index != image.index]
        return self.model_copy(update={"images": tuple(sorted([*others, image], key=lambda each: each.index))})


def status_of(record: JobRecord, state: JobState, *, cancelling: bool, kept_s: float) -> JobStatus:
    """What a client is told.

    Args:
        record: what was asked.
        state: how far it is.
        cancelling: whether somebody asked to end it.
        kept_s: seconds for which jobs are kept after their end.
    """
    done = 1.0 if state.status == "succeeded" else min(1.0, state.steps_done / record.steps)
    return JobStatus(
        id=record.id,
        status=state.status,
        cancelling=cancelling and not state.ended,
        progress=round(done, 4),
        created_at=int(record.created_s),
        ended_at=None if state.ended_s is None else int(state.ended_s),
        expires_at=None if state.ended_s is None else int(state.ended_s + kept_s),
        model=record.model,
        seed=record.request.seed,
        size=record.request.size,
        n=record.request.images,
        images=list(state.images),
        error=state.error,
        webhook=state.webhook,
    )
