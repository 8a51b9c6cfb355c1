"""What the engine tells whoever measures it, and the default, which listens to nothing."""

from __future__ import annotations

from typing import Literal, Protocol

from serving.schemas import GenerationRequest

Outcome = Literal["done", "cancelled", "failed", "expired"]
"""How a request that was accepted ended: with all its images, given up by its client, lost in a step that failed or an
engine that stopped, or past its deadline."""

RejectReason = Literal["queue_full", "invalid", "deadline", "quota", "key", "stopping", "unsafe"]
"""Why a request was refused before it was accepted; a fixed set, because each is a time series of its own."""


class Observer(Protocol):
    """Told of everything that happens to requests; called on the event loop, must return at once and must not raise.

    Every accepted request is finished exactly once, whatever happens to it.
    """

    def accepted(self, request: GenerationRequest) -> None:
        """The request has its places in the queue."""

    def rejected(self, reason: RejectReason) -> None:
        """A request was refused and was never accepted."""

    def stepped(self, width: int, height: int, rows: int, padded_rows: int, seconds: float) -> None:
        """One denoising step is over.

        Args:
            width: of the pictures of its bucket, in pixels.
            height: of the pictures of its bucket, in pixels.
            rows: rows that belong to requests.
            padded_rows: rows that the network was run on, padding included; at least ``rows``.
            seconds: what the step took.
        """

    def previewed(self, request: GenerationRequest, seconds_since_accepted: float) -> None:
        """A preview of one of its images was handed out; the first call for a request is its first preview."""

    def finished(self, request: GenerationRequest, seconds: float, outcome: Outcome) -> None:
        """The request is over, ``seconds`` after it was accepted."""

    def waiting(self, images: int, running: int) -> None:
        """How many images wait and how many are being denoised, whenever either has changed."""


class Silent:
    """An observer that listens to nothing; a base for those that listen to something."""

    def accepted(self, request: GenerationRequest) -> None:
        """Nothing."""

    def rejected(self, reason: RejectReason) -> None:
        """Nothing."""

    def stepped(self, width: int, height: int, rows: int, padded_rows: int, seconds: float) -> None:
        """Nothing."""

    def previewed(self, request: GenerationRequest, seconds_since_accepted: float) -> None:
        """Nothing."""

    def finished(self, request: GenerationRequest, seconds: float, outcome: Outcome) -> None:
        """Nothing."""

    def waiting(self, images: int, running: int) -> None:
        """Nothing."""


class Observers:
    """Several observers, told one after the other."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def accepted(self, request: GenerationRequest) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.accepted(request)

    def rejected(self, reason: RejectReason) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.rejected(reason)

    def stepped(self, width: int, height: int, rows: int, padded_rows: int, seconds: float) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.stepped(width, height, rows, padded_rows, seconds)

    def previewed(self, request: GenerationRequest, seconds_since_accepted: float) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.previewed(request, seconds_since_accepted)

    def finished(self, request: GenerationRequest, seconds: float, outcome: Outcome) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.finished(request, seconds, outcome)

    def waiting(self, images: int, running: int) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.waiting(images, running)
