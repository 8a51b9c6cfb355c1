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

    def __init__(self, error: DarkroomError, *, param: str) -> None:
        self.error = error
        self.param = param
        super().__init__(error.message, value=error.value, rule=error.rule, options=error.options, mend=error.mend)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_request_error, (self.error, self.param)


def _rebuild_request_error(error: DarkroomError, param: str) -> RequestError:
    return RequestError(error, param=param)


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
