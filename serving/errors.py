"""The errors of serving. They know the request's field, not the HTTP status: a dialect chooses that."""

from __future__ import annotations

from training.errors import DarkroomError, UsageError


class ServeError(DarkroomError):
    """The server cannot be deployed, reached or kept running."""


class EngineError(ServeError):
    """Denoising failed or the engine stops; the request is lost, another replica may take it."""


class RequestError(UsageError):
    """A request asks for something that the model or the limits exclude.

    Args:
        error: what is wrong.
        param: the field of the request that is wrong.
    """

    code = "invalid_value"
    """A word for programs, as OpenAI has it."""

    def __init__(self, error: DarkroomError, *, param: str) -> None:
        self.error = error
        self.param = param
        super().__init__(error.message, value=error.value, rule=error.rule, options=error.options, mend=error.mend)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_request_error, (type(self), self.error, self.param)


def _rebuild_request_error(cls: type[RequestError], error: DarkroomError, param: str) -> RequestError:
    return cls(error, param=param)


class QueueFullError(DarkroomError):
    """Too many images wait already.

    Args:
        waiting: images that wait.
        limit: how many may wait.
        retry_after_s: when a place is likely to be free.
    """

    def __init__(self, waiting: int, limit: int, retry_after_s: int) -> None:
        self.waiting = waiting
        self.limit = limit
        self.retry_after_s = retry_after_s
        super().__init__(
            "The server is busy.",
            value=f"{waiting} images waiting",
            rule=f"at most {limit} images wait",
            mend=f"ask again in {retry_after_s} s, or for fewer images",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return QueueFullError, (self.waiting, self.limit, self.retry_after_s)


class DeadlineError(DarkroomError):
    """A request's images cannot be made before its deadline, or are not made yet when it passes.

    Args:
        deadline_s: seconds from acceptance that the request gave.
        needed_s: seconds that it would have taken, at least; where it was accepted, those that it would take in all.
    """

    def __init__(self, deadline_s: float, needed_s: float) -> None:
        self.deadline_s = deadline_s
        self.needed_s = needed_s
        super().__init__(
            "The images cannot be made before the deadline.",
            value=f"{deadline_s:g} s",
            rule=f"they take at least {needed_s:.3g} s from acceptance",
            mend="allow more time, or ask for fewer steps, fewer images or a smaller size",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return DeadlineError, (self.deadline_s, self.needed_s)


class WorkLimitError(DarkroomError):
    """The server has as much work as it takes on.

    Args:
        asked_s: seconds of the device that the request needs, as predicted.
        ahead_s: seconds of the device that wait before it.
        limit_s: seconds that may wait.
        retry_after_s: when there is likely to be room.
    """

    def __init__(self, asked_s: float, ahead_s: float, limit_s: float, retry_after_s: int) -> None:
        self.asked_s = asked_s
        self.ahead_s = ahead_s
        self.limit_s = limit_s
        self.retry_after_s = retry_after_s
        super().__init__(
            "The server is busy.",
            value=f"{asked_s:.3g} s of work behind {ahead_s:.3g} s",
            rule=f"at most {limit_s:g} s of work wait",
            mend=f"ask again in {retry_after_s} s, or for fewer steps, fewer images or a smaller size",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return WorkLimitError, (self.asked_s, self.ahead_s, self.limit_s, self.retry_after_s)


class QuotaError(DarkroomError):
    """An API key has used up what it may ask for.

    Args:
        unit: what is counted, e.g. ``images``.
        asked: how many the request needs.
        left: how many are left now.
        limit: how many there are in a window.
        window_s: of the window.
        wait_s: until there are enough; None where the request asks for more than a whole window has.
    """

    def __init__(
        self, unit: str, asked: float, left: float, limit: float, window_s: float, wait_s: float | None
    ) -> None:
        self.unit = unit
        self.asked = asked
        self.left = left
        self.limit = limit
        self.window_s = window_s
        self.wait_s = wait_s
        super().__init__(
            "This API key's quota is used up." if wait_s is not None else "This API key's quota is too small for this.",
            value=f"{asked:.4g} {unit} wanted, {left:.4g} left",
            rule=f"at most {limit:.4g} {unit} in {window_s:g} s",
            mend="ask for less at once" if wait_s is None else f"ask again in {wait_s:.0f} s",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return QuotaError, (self.unit, self.asked, self.left, self.limit, self.window_s, self.wait_s)


class JobsFullError(DarkroomError):
    """The jobs that are kept take all the room that they may.

    Args:
        kept_bytes: that they take.
        limit_bytes: that they may take.
    """

    def __init__(self, kept_bytes: int, limit_bytes: int) -> None:
        self.kept_bytes = kept_bytes
        self.limit_bytes = limit_bytes
        super().__init__(
            "There is no room for another job.",
            value=f"{kept_bytes} bytes",
            rule=f"all jobs together take at most {limit_bytes} bytes",
            mend="ask again when a job has ended",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return JobsFullError, (self.kept_bytes, self.limit_bytes)
