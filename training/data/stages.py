"""The stages of a build, one after the other; each finds what an earlier try has done of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from training.data.ahead import ahead
from training.data.assembly import Assembly
from training.data.blocks import Block, blocks
from training.data.config import BuildConfig
from training.data.executor import Executor, Failure, all_done
from training.data.findings import Finding
from training.data.forgotten import FORGOTTEN, Forgets, OptOut, opt_outs_json
from training.data.judging import Judge, Judged, Probe
from training.data.manifest import MANIFEST, Manifest
from training.data.origin import ORIGIN, origin_of
from training.data.output import generation_of
from training.data.parts import part_name, read_part
from training.data.planning import Planner, ShardPlan, decided
from training.data.progress import Progress, Step
from training.data.sources import Source
from training.data.storage import Folder
from training.data.workspace import Workspace
from training.data.writing import WriteShard
from training.errors import DataError

_READERS = 8
"""Parts that are read ahead: remote storage takes its time to answer."""


@dataclass(frozen=True)
class Stages:
    """One build.

    Attributes:
        source: what is read.
        out: the data set's folder.
        config: what is asked for.
        workspace: held by this build.
        parts: the folder of the judged parts.
        opt_outs: what the data set in the same place was told to forget.
        executor: where the work is done.
        progress: told how far each stage is.
    """

    source: Source
    out: Folder
    config: BuildConfig
    workspace: Workspace
    parts: Folder
    opt_outs: tuple[OptOut, ...]
    executor: Executor
    progress: Progress

    def run(self, block_inputs: int, *, apart: bool) -> Manifest:
        """All stages: ``made`` holds the data set afterwards, on remote storage all but its manifest.

        Args:
            block_inputs: inputs of a block.
            apart: judge in other processes, however little it is: an input may have killed the one of an earlier try.

        Raises:
            NothingToTrainOn: nothing was kept, or all was held out.
            DataError: a picture changed meanwhile, or some jobs failed whatever was tried.
            StorageError: storage refuses, or does not answer.
            OSError: likewise.
        """
        names = self._judge(block_inputs, apart)
        self.progress(Step("decide", 0, None))
        decisions = decided((part for _, part in self._parts(names)), self.config.clean)
        opt_outs, made = self.opt_outs, self.workspace.made
        write = WriteShard(self.parts, self.workspace.notes, made, self.config.clean)
        with Assembly(made, self.config, generation_of(self.out), decisions, Forgets(opt_outs)) as assembly:
            done = 0
            for plan, facts in all_done(self.executor, write, self._plans(assembly.planner, names, block_inputs)):
                assembly.add(plan.name, facts)
                done += len(plan.samples)
                self.progress(Step("write", done, decisions.kept, dropped=assembly.planner.dropped.total()))
        assembly.require_training(self.source.place)
        manifest = assembly.manifest()
        made.write(ORIGIN, origin_of(self.source))
        if made.local is not None:
            if opt_outs:
                made.write(FORGOTTEN, opt_outs_json(opt_outs))
            made.write(MANIFEST, manifest.as_json().encode())
            _keep_only(made.local, {*manifest.files, MANIFEST, ORIGIN, *([FORGOTTEN] if opt_outs else [])})
        return manifest

    @property
    def _staged(self) -> bool:
        return self.source.volatile or self.config.store.kind != "original"

    def _judge(self, block_inputs: int, apart: bool) -> list[str]:
        """Judge what is not judged yet; returns the names of all parts."""
        known = set(self.parts.names())
        names: list[str] = []
        total = self.source.count()
        state = Step("judge", 0, total)
        self.progress(state)

        def missing() -> Iterator[Block]:
            nonlocal state
            for block in blocks(self.source, block_inputs):
                names.append(block.name)
                if part_name(block.name) in known:
                    inputs = len(block.items)
                    state = replace(state, done=state.done + inputs, found=state.found + inputs)
                    self.progress(state)
                else:
                    yield block

        work = Judge(self.parts, self.config, self._staged)
        apart = apart or self.source.volatile  # a host may be silent for minutes: a process can be ended meanwhile
        for _, judged in all_done(self.executor, work, missing(), partial(self._rescued, work), apart=apart):
            state = replace(state, done=state.done + judged.inputs, dropped=state.dropped + judged.dropped.total())
            self.progress(state)
        return names

    def _rescued(self, work: Judge, block: Block) -> Judged | Failure:
        """A block of which some input kills the process that touches it: that one is refused, the others are judged."""
        single = (Block(number, number, (item,)) for number, item in enumerate(block.items, start=block.first))
        fatal = [
            one.first for one, done in self.executor.run(Probe(work), single, apart=True) if isinstance(done, Failure)
        ]
        finding = Finding("corrupt", detail="the process that decoded it died")
        careful = replace(work, refused=tuple((number, finding) for number in sorted(fatal)))
        return next(done for _, done in self.executor.run(careful, [block]))

    def _parts(self, names: list[str]) -> Iterator[tuple[str, pa.Table]]:
        """All parts in order, by name."""
        read = partial(read_part, self.parts)
        return ((name, begun.result()) for name, begun in ahead(read, names, _READERS))

    def _plans(self, planner: Planner, names: list[str], block_inputs: int) -> Iterator[ShardPlan]:
        """The shards, each as soon as it is planned."""
        again = None if self._staged else blocks(self.source, block_inputs)
        for name, part in self._parts(names):
            block = next(again, None) if again is not None else None
            if again is not None and (block is None or block.name != name):
                raise _changed(self.source)
            yield from planner.shards(name, part, None if block is None else block.items)
        yield from planner.rest()


def _changed(source: Source) -> DataError:
    return DataError(
        "The source changed while the data set was built.",
        value=source.place,
        rule="it lists the same inputs at each visit",
        mend="run the same command again: only what changed is judged anew",
    )


def _keep_only(made: Path, names: set[str]) -> None:
    """Leave nothing of what an earlier try had planned otherwise, or was killed in the middle of."""
    for path in made.iterdir():
        if path.name not in names:
            path.unlink()
