"""The errors that Darkroom raises at its boundaries.

Every message states the value that was refused, the rule that refused it and what would be accepted, so that
a reader can mend the cause without opening the source.
"""

from __future__ import annotations

from collections.abc import Sequence


class DarkroomError(Exception):
    """Something failed; the message is complete in itself and fits on one screen.

    Args:
        message: what happened, in one sentence.
        value: the offending value, shown with ``repr``.
        rule: the rule that it broke.
        options: what would have been accepted.
        mend: what to do next.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        value: object = None,
        rule: str | None = None,
        options: Sequence[object] = (),
        mend: str | None = None,
    ) -> None:
        self.message = message
        self.value = value
        self.rule = rule
        self.options = tuple(str(option) for option in options)
        self.mend = mend
        super().__init__(self.as_text())

    def as_text(self) -> str:
        """The message and its details, one labelled line each."""
        lines = [self.message]
        if self.value is not None:
            lines.append(f"  value:   {self.value!r}")
        if self.rule:
            lines.append(f"  rule:    {self.rule}")
        if self.options:
            lines.append(f"  options: {', '.join(self.options)}")
        if self.mend:
            lines.append(f"  mend:    {self.mend}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        details = {"value": self.value, "rule": self.rule, "options": self.options, "mend": self.mend}
        return _rebuild, (type(self), self.message, details)


def _rebuild(cls: type[DarkroomError], message: str, details: dict[str, object]) -> DarkroomError:
    """Errors cross process borders inside Ray; keyword arguments do not survive the default pickling."""
    return cls(message, **details)  # type: ignore[arg-type]


class UsageError(DarkroomError):
    """The caller asked for something that the rules exclude."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or an override is not valid."""


class DataError(DarkroomError):
    """A data set cannot be built, read or trusted."""


class StorageError(DarkroomError):
    """Storage answers with errors; what it holds may be whole, so the same command can go on later."""


class CheckpointError(DarkroomError):
    """A checkpoint is missing, incomplete or belongs to another model."""


class TrainingError(DarkroomError):
    """A training process failed and could not be continued."""


class RegistryError(DarkroomError):
    """The model registry does not hold what was asked for."""


class TrackingError(DarkroomError):
    """The MLflow server cannot be reached or refuses."""


class StackError(DarkroomError):
    """The local stack or the remote cluster cannot be used."""
