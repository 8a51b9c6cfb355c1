"""Keeps a run's state: each step in the node's memory, now and then in storage; and brings it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from training import ranks
from training.checkpoint.config import CheckpointConfig
from training.checkpoint.memory import NodeMemory
from training.checkpoint.slab import Packer, Slab
from training.checkpoint.source import PartsSource
from training.checkpoint.stored import Checkpoint
from training.checkpoint.verified import newest_together
from training.checkpoint.writer import Save, Writer
from training.data.storage import Folder
from training.errors import CheckpointError, DarkroomError

if TYPE_CHECKING:
    import torch

    from training.checkpoint.layout import Layout
    from training.engine_state import Part, StateSource


LEAVING_S = 60.0
"""How long a run that ends in an error waits for the checkpoint that it was writing."""


class Stateful(Protocol):
    """What has a state in parts: the engine, the average."""

    def parts(self) -> Sequence[Part]:
        """This rank's."""
        ...

    def take(self, source: StateSource) -> None:
        """Be as the source says. Every rank calls it."""
        ...


class Engine(Stateful, Protocol):
    """The engine has numbers besides."""

    def scalars(self) -> Mapping[str, float]:
        """The same on every rank."""
        ...


@dataclass(frozen=True)
class Where:
    """Which run, attempt and process.

    Attributes:
        folder: where the run's checkpoints lie, the same on every rank.
        rank: of this process.
        world: how many there are.
        token: names this attempt, the same on every rank.
    """

    folder: Folder
    rank: int
    world: int
    token: str


class Keeper:
    """One rank's.

    Args:
        where: which process.
        config: the recipe's section.
        engine: holds weights and optimizer.
        averages: the averaged weights.
        memory: this rank's on its node; None where there is none.
        warn: takes what the user should know.
    """

    def __init__(
        self,
        where: Where,
        config: CheckpointConfig,
        engine: Engine,
        averages: Stateful,
        memory: NodeMemory | None,
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._warn = config, warn
        self._engine, self._averages, self.memory = engine, averages, memory
        self._folder = where.folder
        self._writer = Writer(self._folder, config, where.token, where.rank, where.world)
        self._packer = Packer()
        self._own: Slab | None = None
        self._lists: tuple[Sequence[Part], Sequence[Part]] | None = None
        self._parts: list[Part] = []

    def keep(self, done: int) -> None:
        """The state after ``done`` steps, into the node's memory; ``commit`` makes it one to go on from."""
        every = self._config.memory_every_steps
        if self.memory is None or every == 0 or done % every or done in self.memory.steps:
            return
        try:
            self.memory.put(done, *self._packed(), self._engine.scalars())
        except CheckpointError as error:
            self._warn(f"Only checkpoints keep the run's state. {error}")
            self.memory.clear()
            self.memory = None

    def commit(self, done: int, told: Mapping[str, Any]) -> None:
        """What was kept last is whole, and all that belongs to it is written.

        Args:
            done: steps done.
            told: what the run needs to go on from there; JSON.
        """
        if self.memory is not None:
            self.memory.commit(done, told)

    def save(
        self,
        done: int,
        position: int,
        metrics: Mapping[str, float],
        about: Mapping[str, Any],
        *,
        first: Callable[[], None],
        wait: bool,
    ) -> None:
        """A checkpoint, written beside the next steps. Every rank calls it.

        Args:
            done: steps done.
            position: samples consumed.
            metrics: measured at this step.
            about: what the run records; rank 0's is written.
            first: rank 0 calls it, in another thread, before the checkpoint can be seen.
            wait: return once it is in storage.

        Raises:
            StorageError: it, or the one before, cannot be written.
        """
        self._writer.wait()
        slot = self.memory.pin(done) if self.memory is not None else None
        if slot is not None and self.memory is not None:
            slab, release = slot.slab, self.memory.unpin
        else:
            slab, release = self._copied(), _nothing
        self._writer.begin(Save(done, position, slab, metrics, about, first, release))
        if wait:
            self._writer.wait()

    def written(self) -> Iterator[Checkpoint]:
        """The checkpoints that came to exist since the last call."""
        yield from self._writer.written()

    def restore(self, done: int) -> None:
        """Go back, or on, to the state that every rank's memory keeps of ``done`` steps. Every rank calls it.

        Raises:
            CheckpointError: some rank has not kept it.
        """
        slab = ranks.on_every_rank(lambda: self._kept(done))
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for told in ranks.gather(slab.layout.shapes):  # a rank knows nothing of tensors that it holds no part of
            for group, names in told.items():
                shapes.setdefault(group, {}).update(names)
        self.take(PartsSource(slab.scalars, slab.parts(), shapes))

    def rewind(self) -> int:
        """Go back to the newest checkpoint, one that is still being written included. Every rank calls it.

        Returns:
            Its step.

        Raises:
            CheckpointError: there is none.
        """
        self._writer.wait()
        found, refused = newest_together(self._folder)
        for reason in refused:
            self._warn(f"A checkpoint was passed over. {reason}")
        if found is None:
            raise CheckpointError("There is no checkpoint to go back to.", value=str(self._folder))
        self.take(found.source())
        return found.step

    def take(self, source: PartsSource) -> None:
        """Be as a source says. Every rank calls it."""
        self._engine.take(source)
        self._averages.take(source)

    def close(self, *, ended: bool) -> None:
        """Nothing more is kept; a save that is being written is waited for.

        Args:
            ended: the state is in storage or of no use, so that the node's memory is freed.
        """
        try:
            self._writer.wait(LEAVING_S)
        except (DarkroomError, TimeoutError) as error:
            self._warn(f"The last checkpoint that was begun did not come to be. {error}")
        self._writer.close()
        if self.memory is not None:
            (self.memory.clear if ended else self.memory.close)()
            self.memory = None

    def _packed(self) -> tuple[Layout, list[torch.Tensor]]:
        lists = (self._engine.parts(), self._averages.parts())
        if self._lists is None or any(one is not other for one, other in zip(lists, self._lists, strict=True)):
            self._lists, self._parts = lists, [part for each in lists for part in each]
        return self._packer.values(self._parts)

    def _copied(self) -> Slab:
        layout, values = self._packed()
        if self._own is None or self._own.layout is not layout:
            self._own = Slab(layout)
        self._own.fill(values, self._engine.scalars())
        return self._own

    def _kept(self, done: int) -> Slab:
        slot = self.memory.slot(done) if self.memory is not None else None
        if slot is None:
            raise CheckpointError(
                "The state of that step is not kept in the node's memory.",
                value=done,
                rule=f"kept: {self.memory.steps if self.memory else 'none'}",
                mend="checkpoint.memory_every_steps=1, and a /dev/shm that has room for it",
            )
        return slot.slab


def _nothing() -> None:
    """There is nothing to let go of."""
