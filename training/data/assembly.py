"""The last stage of a build: ledger, indexes and manifest, written while the shards are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from training.data.config import BuildConfig
from training.data.entries import printable
from training.data.findings import Finding
from training.data.index import IndexWriter
from training.data.ledger import LEDGER, LedgerWriter
from training.data.manifest import SPLITS, FileFacts, Manifest, content_hash, file_facts
from training.data.planning import Decisions, Planner, index_name
from training.data.shards import file_name
from training.data.storage import Folder
from training.errors import DataError


class NothingToTrainOnError(DataError):
    """No picture is left to train on: a verdict about the source, which another try does not change."""


class Assembly:
    """Ledger and indexes while they are written; they are whole, and in ``made``, when the block ends well.

    Args:
        made: where they go.
        config: what is asked for.
        generation: of the files' names.
        decisions: what was decided over the whole set.
        forgotten: see ``Planner``.
    """

    def __init__(
        self,
        made: Folder,
        config: BuildConfig,
        generation: int,
        decisions: Decisions,
        forgotten: Callable[[Mapping[str, Any]], Finding | None],
    ) -> None:
        self._made = made
        self._config = config
        self._generation = generation
        self._files: dict[str, FileFacts] = {}
        self._stack = ExitStack()
        self._folder = made.local or Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._names = [file_name(LEDGER, generation), *(file_name(index_name(name), generation) for name in SPLITS)]
        self._writers = ExitStack()
        ledger = self._writers.enter_context(LedgerWriter(self._folder / self._names[0]))
        indexes = {
            split: self._writers.enter_context(IndexWriter(self._folder / name))
            for split, name in zip(SPLITS, self._names[1:], strict=True)
        }
        self.planner = Planner(config, generation, decisions, forgotten, ledger, indexes)

    def add(self, name: str, facts: FileFacts) -> None:
        """Note a finished shard."""
        self._files[name] = facts

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._stack:
            self._writers.__exit__(kind, error, at)
            for name in self._names if kind is None else ():
                self._files[name] = file_facts(self._folder / name)
                if self._made.local is None:
                    self._made.upload(self._folder / name, name)

    def manifest(self) -> Manifest:
        """The manifest of the whole data set."""
        planner, splits = self.planner, self.planner.splits()
        return Manifest(
            hash=content_hash(splits, self._files, self._config.background),
            config=self._config,
            source_digest=planner.source_digest,
            generation=self._generation,
            ledger=self._names[0],
            inputs=planner.inputs,
            kept=planner.kept,
            without_caption=planner.without_caption,
            dropped=dict(sorted(planner.dropped.items())),
            licences=planner.licences.most(),
            splits=splits,
            files=dict(sorted(self._files.items())),
        )

    def require_training(self, source: str) -> None:
        """At least one picture is left to train on.

        Raises:
            NothingToTrainOnError: with the reasons.
        """
        planner, splits = self.planner, self.planner.splits()
        if splits["train"].count:
            return
        if splits["held_out"].count:
            raise NothingToTrainOnError(
                "All pictures that were kept fell to the held-out split; none is left to train on.",
                value=splits["held_out"].count,
                rule="at least one picture to train on",
                mend="more pictures, or a smaller --held-out",
            )
        counts = ", ".join(f"{count} {rule}" for rule, count in sorted(planner.dropped.items()))
        lines = [f"{name}: {rule} {printable(detail)}".rstrip() for name, rule, detail in planner.refused]
        examples = "".join(f"\n           {line}" for line in lines)
        raise NothingToTrainOnError(
            f"None of the {planner.inputs} inputs could be kept.",
            value=source,
            rule=f"at least one usable picture; dropped were {counts}{examples}",
            mend="mend the files, or loosen the rules with --set clean.SECTION.KEY=VALUE",
        )
