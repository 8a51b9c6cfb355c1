"""What a data set was told to forget: it stays out when the data set is built again in its place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from training.data.clean.consent import OptOuts, domain_name, folded, opted_out
from training.data.findings import Finding
from training.data.storage import Folder
from training.errors import DataError

FORGOTTEN = "forgotten.json"
"""The opt-outs of a data set; written before anything is taken out, and carried on by `data build --force`."""

_SHA256 = re.compile("[0-9a-fA-F]{64}")

Selector = Literal["hash", "creator", "domain"]


class OptOut(BaseModel):
    """One wish."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    selector: Selector
    """What ``value`` is compared with."""
    value: str
    """A sha256 in hexadecimal digits; a creator, without regard to case and spaces; a domain, with its subdomains."""
    when: str
    """The day on which it was asked for, ``YYYY-MM-DD``."""

    @model_validator(mode="after")
    def _means_something(self) -> OptOut:
        parsed = {
            "hash": bool(_SHA256.fullmatch(self.value)),
            "creator": bool(folded(self.value)),
            "domain": bool(domain_name(self.value)),
        }
        if not parsed[self.selector]:
            raise ValueError(f"this names no {self.selector}: {self.value!r}")
        return self

    def describe(self) -> str:
        """The wish in words, for the ledger."""
        return f"{self.selector} {self.value}, {self.when}"


_LIST: TypeAdapter[tuple[OptOut, ...]] = TypeAdapter(tuple[OptOut, ...])


def read_opt_outs(out: Folder) -> tuple[OptOut, ...]:
    """The opt-outs of a data set, in the order in which they came.

    Raises:
        DataError: they cannot be understood, and so not be obeyed.
        StorageError: storage does not answer.
    """
    try:
        return _LIST.validate_json(out.read(FORGOTTEN))
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        raise DataError(
            "The data set's opt-outs cannot be read.",
            value=out.url(FORGOTTEN),
            rule=f"a list of selector, value and when; {error.errors()[0]['msg']}",
            mend="put back the file from a copy: it says what must stay out",
        ) from error


def opt_outs_json(opt_outs: tuple[OptOut, ...]) -> bytes:
    """The content of ``FORGOTTEN``."""
    return json.dumps([each.model_dump() for each in opt_outs], indent=1).encode() + b"\n"


@dataclass(frozen=True)
class Forgets:
    """Says of a ledger's row which opt-out it falls under, the oldest first.

    Attributes:
        opt_outs: those that count.
    """

    opt_outs: tuple[OptOut, ...]

    def __call__(self, row: Mapping[str, Any]) -> Finding | None:
        """The finding for a row with ``sha256`` and ``fields``; None where it may stay."""
        if not self._meant(row, self._lists):
            return None
        found = next(each for each in self.opt_outs if self._meant(row, _lists((each,))))
        return Finding("forgotten", detail=found.describe())

    @cached_property
    def _lists(self) -> OptOuts:
        return _lists(self.opt_outs)

    @staticmethod
    def _meant(row: Mapping[str, Any], lists: OptOuts) -> bool:
        if lists.hashes and row["sha256"] and bytes.fromhex(row["sha256"]) in lists.hashes:
            return True
        return bool(lists.creators or lists.domains) and opted_out(json.loads(row["fields"]), lists) is not None


def _lists(opt_outs: tuple[OptOut, ...]) -> OptOuts:
    """Opt-outs as the rules of cleaning know them: both compare in the same way."""

    def values(selector: Selector) -> list[str]:
        return [each.value for each in opt_outs if each.selector == selector]

    return OptOuts(
        hashes=frozenset(bytes.fromhex(value) for value in values("hash")),
        domains=frozenset(domain_name(value) for value in values("domain")),
        creators=frozenset(folded(value) for value in values("creator")),
    )
