"""How the parts of one rank lie in one stretch of memory, so that each of its files is a header and a slice of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from training.engine_state import Part

_ALIGN = 64
_TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""safetensors' names of types: torch's name and the bytes of an element."""
_NAMES = {torch_name: name for name, (torch_name, _) in _TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A part without its values.

    Attributes:
        group: see ``Part``.
        name: see ``Part``.
        shape: of the whole tensor.
        start: see ``Part``.
        count: elements.
        type: as safetensors calls it.
        offset: of the first byte.
    """

    group: str
    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    type: str
    offset: int

    @property
    def kind(self) -> str:
        """The file that it goes to: ``weights``, ``ema``, ``optimizer``."""
        return self.group.partition(".")[0]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * _TYPES[self.type][1]

    @property
    def key(self) -> str:
        """Its name in the file; a whole tensor of the first slot has the weight's own."""
        slot = self.group.partition(".")[2]
        name = f"{self.name}/{slot}" if slot else self.name
        return name if self.is_whole else f"{name}[{self.start}]"

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.count == math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As torch calls it."""
        import torch

        found: torch.dtype = getattr(torch, _TYPES[self.type][0])
        return found


@dataclass(frozen=True)
class Layout:
    """Where each part lies.

    Attributes:
        entries: in the order of their bytes.
        size: bytes in all.
    """

    entries: tuple[Entry, ...]
    size: int

    @classmethod
    def of(cls, parts: Sequence[Part]) -> tuple[Layout, list[int]]:
        """The layout, and which part each entry is of; parts without elements of a tensor that has some are left out.

        Files come one after another, and in each the widest types first, which keeps every element aligned.
        """
        kept = [n for n, part in enumerate(parts) if part.values.numel() or not math.prod(part.shape)]
        kept.sort(key=lambda n: (parts[n].group.partition(".")[0], -parts[n].values.element_size()))
        entries: list[Entry] = []
        offset = 0
        for number in kept:
            part = parts[number]
            if entries and entries[-1].kind != part.group.partition(".")[0]:
                offset = -(-offset // _ALIGN) * _ALIGN
            dtype = _NAMES[str(part.values.dtype).removeprefix("torch.")]
            entry = Entry(part.group, part.name, tuple(part.shape), part.start, part.values.numel(), dtype, offset)
            entries.append(entry)
            offset += entry.size
        return cls(tuple(entries), offset), kept

    def fits(self, parts: Sequence[Part], order: Sequence[int]) -> bool:
        """Whether ``parts`` lie as these entries do."""
        return len(parts) >= len(order) and all(
            (entry.group, entry.name, entry.start, entry.count)
            == (part.group, part.name, part.start, part.values.numel())
            for entry, part in zip(self.entries, (parts[n] for n in order), strict=True)
        )

    @cached_property
    def kinds(self) -> Mapping[str, tuple[Entry, ...]]:
        """The entries of each file."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.kind, []).append(entry)
        return {kind: tuple(entries) for kind, entries in found.items()}

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Of the whole tensors that parts are of, by group and name."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for entry in self.entries:
            found.setdefault(entry.group, {})[entry.name] = entry.shape
        return found

    def span(self, kind: str) -> slice:
        """A file's bytes."""
        first, last = self.kinds[kind][0], self.kinds[kind][-1]
        return slice(first.offset, last.offset + last.size)

    def header(self, kind: str) -> bytes:
        """What a file of safetensors begins with."""
        begin = self.span(kind).start
        table: dict[str, Any] = {"__metadata__": {}}
        for entry in self.kinds[kind]:
            place = entry.offset - begin
            shape = list(entry.shape) if entry.is_whole else [entry.count]
            table[entry.key] = {"dtype": entry.type, "shape": shape, "data_offsets": [place, place + entry.size]}
            table["__metadata__"][entry.key] = json.dumps([entry.group, entry.name, entry.shape, entry.start])
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def views(self, buffer: Any) -> list[torch.Tensor]:
        """A flat tensor over each entry's bytes of a writable buffer."""
        import torch

        return [
            torch.frombuffer(buffer, dtype=entry.dtype, count=entry.count, offset=entry.offset)
            if entry.count
            else torch.empty(0, dtype=entry.dtype)
            for entry in self.entries
        ]

    def as_json(self) -> bytes:
        """For ``from_json``."""
        return json.dumps([self.size, [list(asdict(entry).values()) for entry in self.entries]]).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Layout:
        """What ``as_json`` gave.

        Raises:
            ValueError: it is something else.
        """
        size, rows = json.loads(data)
        entries = tuple(Entry(group, name, tuple(shape), *rest) for group, name, shape, *rest in rows)
        return cls(entries, size)


def entries_of(header: Mapping[str, Any], begin: int) -> list[Entry]:
    """The entries of a safetensors header that ``Layout.header`` made; offsets count from the file's first byte.

    Args:
        header: parsed.
        begin: where the data begins.

    Raises:
        KeyError: it is a file of somebody else.
    """
    found = []
    for key, described in header["__metadata__"].items():
        group, name, shape, start = json.loads(described)
        facts = header[key]
        first, last = facts["data_offsets"]
        count = (last - first) // _TYPES[facts["dtype"]][1]
        found.append(Entry(group, name, tuple(shape), start, count, facts["dtype"], begin + first))
    return found
