"""Who asked for what, on disk: how it is kept."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class AuditConfig(BaseModel):
    """The audit log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: str | None = None
    """Where the files are, one series for each replica's process; None keeps no log."""
    prompts: bool = False
    """Write the prompts themselves, and not only their checksums."""
    max_file_bytes: int = Field(default=20_000_000, ge=10_000)
    """A file that is larger is closed and a new one begun."""
    max_files: int = Field(default=50, ge=2)
    """Files in the directory; the oldest ones are removed, whoever wrote them."""
