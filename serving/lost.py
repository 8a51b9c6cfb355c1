"""Pictures that are lost: what their owners are told, and what the log is told."""

from __future__ import annotations

import logging

from serving.errors import EngineError

log = logging.getLogger(__name__)


def lost(message: str, cause: BaseException) -> EngineError:
    """The error for clients; its cause is for the log alone.

    Args:
        message: what failed, in a sentence.
        cause: why.
    """
    log.error("%s", message, exc_info=cause)
    error = EngineError(message, mend="send the request again; the server's log has the cause")
    error.__cause__ = cause
    return error


def not_running() -> EngineError:
    """The error of a request that comes before the engine starts or after it has stopped."""
    return EngineError("The engine is not running.", mend="send the request again")
