"""Why an input is refused: the rule, what it found, and what it would have accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Rule = Literal[
    "too_many_bytes",
    "too_many_pixels",
    "too_small",
    "extreme_aspect",
    "undecodable",
    "truncated",
    "corrupt",
    "damaged_jpeg",
    "unpacks_too_far",
    "too_many_scans",
    "too_many_frames",
    "animated",
    "uniform",
    "blurred",
    "unsafe",
    "outlier",
    "caption_mismatch",
    "no_caption",
    "caption_too_short",
    "no_licence",
    "licence_not_accepted",
    "opt_out_hash",
    "opt_out_domain",
    "opt_out_creator",
    "exact_duplicate",
    "near_duplicate",
    "forgotten",
    "unreadable",
    "unsafe_name",
    "unsafe_member",
    "not_a_file",
    "duplicate_name",
    "outside_source",
    "missing_file",
    "bad_row",
    "duplicate_row",
    "bad_sidecar",
    "sidecar_without_image",
    "damaged_tar",
    "bad_url",
    "address_refused",
    "download_failed",
    "download_timeout",
    "download_too_large",
    "too_many_redirects",
    "opted_out_noai",
    "not_a_picture",
]
"""Why an input was dropped; the ledger names one of these."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Why an input is refused.

    Attributes:
        rule: the rule's name.
        value: what was found.
        threshold: what would have been accepted.
        detail: the reason in words.
        of: the number of the input that is kept instead, for copies.
    """

    rule: Rule
    value: float | None = None
    threshold: float | None = None
    detail: str = ""
    of: int | None = None


class RefusedError(Exception):
    """An input cannot be used; never leaves ``training.data``, it becomes a line of the ledger."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.detail or finding.rule)
        self.finding = finding


def describe(error: BaseException) -> str:
    """An exception in one short line, without memory addresses, which would differ between builds."""
    text = str(error).split("<_io.")[0].strip()
    return f"{type(error).__name__}: {text}"[:200]
