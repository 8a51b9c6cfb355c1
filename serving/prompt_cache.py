"""Prompts that were encoded before, and what came of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from training.conditioning import Conditioning


class Encoder(Protocol):
    """What turns prompts into conditioning; ``training.conditioning.TextEncoder`` is one."""

    @property
    def hash(self) -> str:
        """Equal hashes give equal rows."""

    def check(self, prompt: str) -> None:
        """Refuse, with a ``UsageError``, a prompt that would be cut."""

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """One row per caption; ``""`` is the unconditional caption."""
        ...


class PromptCache:
    """The rows of the prompts that were used last, up to so many bytes.

    A prompt is always encoded alone, whether it is kept or not: an encoder's last bits depend on the batch too.

    Args:
        max_bytes: of all rows; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self._rows: OrderedDict[tuple[str, str], Conditioning] = OrderedDict()

    def encode(self, encoder: Encoder, prompt: str, device: str) -> Conditioning:
        """One row, on the device.

        Args:
            encoder: whose row.
            prompt: which the encoder has checked.
            device: where the row goes; one cache serves one device.
        """
        if not self.max_bytes:
            return encoder.encode([prompt]).to(device)
        key = (encoder.hash, prompt)
        if (found := self._rows.get(key)) is not None:
            self._rows.move_to_end(key)
            self.hits += 1
            return found
        row = encoder.encode([prompt]).to(device)
        self._rows[key] = row
        self.bytes += _bytes(row)
        while self.bytes > self.max_bytes:
            self.bytes -= _bytes(self._rows.popitem(last=False)[1])
        return row


def _bytes(row: Conditioning) -> int:
    tensors = [row.tokens, row.mask, *([] if row.pooled is None else [row.pooled])]
    return sum(each.nbytes for each in tensors)
