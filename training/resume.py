"""Where a run begins: alone, and from its newest whole state where there is one."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import checkpoint, run_lock
from training.config import EXACT, TrainConfig
from training.data.storage import Folder
from training.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from training.checkpoint.memory import NodeMemory

RUN_ID = "run.id"
"""A file in the run's folder. A state in a node's memory is of this id: a run that went on from elsewhere, or another
folder of its name, has another one, and what it did not go on from can never be gone on from later."""

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Beginning:
    """What rank 0 settles for all ranks of an attempt.

    Attributes:
        attempt: names it.
        run_id: names the run.
        folder: where its checkpoints lie.
        candidates: the checkpoints that are there, newest first, and what is wrong with others.
    """

    attempt: str
    run_id: str
    folder: Folder
    candidates: list[checkpoint.Checkpoint | CheckpointError]


@dataclass(frozen=True)
class State:
    """What a run goes on from.

    Attributes:
        step: optimizer steps done.
        about: what the run recorded with it.
        place: where it is, for messages.
        durable: the checkpoint; None where every rank has the state in its node's memory.
    """

    step: int
    about: Mapping[str, Any]
    place: str
    durable: checkpoint.Checkpoint | None


def begin(
    config: TrainConfig, run_dir: Path, data_hash: str, *, warn: Warn, give_up: Callable[[], bool]
) -> Beginning | None:
    """Become the run's only writer, and look at what it has left in storage. For rank 0.

    Args:
        config: the recipe.
        run_dir: the run's folder.
        data_hash: the data set's name.
        warn: takes what the user should know.
        give_up: asked while this waits for a predecessor; True ends the wait.

    Returns:
        None after ``give_up``.

    Raises:
        TrainingError: another process trains the run.
        CheckpointError: the run began with another recipe or data set.
        StorageError: storage does not answer.
    """
    if run_lock.hold(run_dir, on_wait=warn, give_up=give_up) is None:
        return None
    folder = checkpoint.place(config.checkpoint, run_dir)
    candidates = list(checkpoint.found_in(folder))
    newest = next((found for found in candidates if isinstance(found, checkpoint.Checkpoint)), None)
    if newest is not None:
        _check_recipe(newest, config, warn)
        _check_data(newest, data_hash)
    return Beginning(uuid.uuid4().hex[:8], _known_id(run_dir), folder, candidates)


@dataclass(frozen=True)
class Place:
    """Which process of which run.

    Attributes:
        run_dir: the run's folder.
        data_hash: the data set's name.
        rank: of this process.
        world: how many there are.
    """

    run_dir: Path
    data_hash: str
    rank: int
    world: int


def settle(
    beginning: Beginning, config: TrainConfig, place: Place, warn: Warn
) -> tuple[State | None, NodeMemory | None]:
    """What the run goes on from, and where its steps are kept from now on. Every rank calls it.

    Args:
        beginning: of this attempt.
        config: the recipe.
        place: this process.
        warn: takes what the user should know.

    Returns:
        The newest state that every rank can read, None for a fresh run; and this rank's memory on its node, None where
        there is none.

    Raises:
        StorageError: storage does not answer.
    """
    from training import ranks
    from training.checkpoint.memory import NodeMemory
    from training.checkpoint.room import ROOT

    memory = None
    if config.checkpoint.memory_every_steps:
        # what has no place in the node's memory is not kept there either
        root = Path(config.engine.offload_path) if config.engine.offload_path else ROOT
        opened = NodeMemory.open(place.run_dir, place.rank, identity(config, beginning.run_id, place), root)
        if isinstance(opened, NodeMemory):
            memory = opened
        else:
            warn(f"Only checkpoints keep the run's state: {opened}.")
    tell: Warn = warn if place.rank == 0 else lambda _: None
    if memory is not None and memory.ignored:
        tell(f"The state in the node's memory is not gone on from: {memory.ignored}.")
    found = choose(beginning, memory, tell)
    if found is None or found.durable is not None:
        # what is in memory now is of a past that the run leaves
        anew = ranks.on_rank_zero(lambda: renew(place.run_dir))
        if memory is not None:
            memory.renew(identity(config, anew, place))
    return found, memory


def choose(beginning: Beginning, memory: NodeMemory | None, warn: Warn) -> State | None:
    """The newest state that every rank can read: of the nodes' memories or of storage. Every rank calls it.

    Args:
        beginning: of this attempt.
        memory: this rank's.
        warn: takes what the user should know.

    Returns:
        None for a fresh run.

    Raises:
        StorageError: storage does not answer.
    """
    from training import ranks
    from training.checkpoint.verified import newest_together

    everyone = ranks.gather(set(memory.steps) if memory is not None else set())
    kept = max(set.intersection(*everyone), default=0)
    durable, refused = newest_together(beginning.folder, kept - 1, beginning.candidates)
    for reason in refused:
        warn(f"A checkpoint was passed over. {reason}")
    if durable is not None:
        return State(durable.step, durable.about, durable.path, durable)
    if kept and memory is not None:
        slot = memory.slot(kept)
        told = ranks.on_rank_zero(lambda: dict(slot.told) if slot is not None else {})
        memory.forget(after=kept)
        return State(kept, told, "the memory of the nodes", None)
    return None


def renew(run_dir: Path) -> str:
    """Another id for the run, which goes on from no memory. For rank 0.

    Raises:
        StorageError: the run's folder cannot be written.
    """
    path = run_dir / RUN_ID
    try:
        aside = path.with_suffix(".partial")
        aside.write_text(uuid.uuid4().hex)
        aside.replace(path)
        return path.read_text()
    except OSError as error:
        raise StorageError("The run's folder cannot be used.", value=str(path), rule=error.strerror) from error


def identity(config: TrainConfig, run_id: str, place: Place) -> dict[str, Any]:
    """What a state in memory must be of, to be gone on from."""
    recipe = config.model_dump(mode="json")
    return {
        "run": run_id,
        "data": place.data_hash,
        "world": place.world,
        "engine": recipe["engine"],
        "recipe": {section: _at(recipe, section) for section in EXACT},
    }


def refuse_early(config: TrainConfig, run_dir: Path, data_hash: str | None = None) -> None:
    """Refuse a recipe that the run's checkpoints cannot go on with, before a worker starts. Needs no torch.

    Args:
        config: the recipe.
        run_dir: the run's folder.
        data_hash: the data set's name, where it is known already.

    Raises:
        CheckpointError: the run began with another recipe or data set.
    """
    try:
        found, _ = checkpoint.newest(checkpoint.place(config.checkpoint, run_dir), contents=False)
    except StorageError:
        return  # the workers may reach what this machine does not
    if found is None:
        return
    _check_recipe(found, config, lambda _: None)
    if data_hash is not None:
        _check_data(found, data_hash)


def _known_id(run_dir: Path) -> str:
    try:
        return (run_dir / RUN_ID).read_text()
    except FileNotFoundError:
        return renew(run_dir)


def _check_data(found: checkpoint.Checkpoint, data_hash: str) -> None:
    if found.about["data_hash"] == data_hash:
        return
    raise CheckpointError(
        "The run was trained on another data set.",
        value=data_hash,
        rule=f"data hash {found.about['data_hash']}, as in {found.path}",
        mend="give the run another name: a data set that was built again, or that `darkroom data forget` has"
        " changed, is another one; or give it the data set that it began with",
    )


def _check_recipe(found: checkpoint.Checkpoint, config: TrainConfig, warn: Warn) -> None:
    """What shapes the weights must be as it was; how and where it is computed may change."""
    before, now = found.about["config"], config.model_dump(mode="json")
    for section in changed(before, now):
        raise CheckpointError(
            f"The run {config.name} began with another recipe: {section} has changed.",
            value=_at(now, section),
            rule=f"{section} as in {found.path}: {_at(before, section)}",
            mend="give the run another name with --set name=..., or the recipe that it began with",
        )
    if before["steps"] != now["steps"] and config.schedule.kind != "constant":
        warn(f"The learning rate was laid out for {before['steps']} steps and is now for {now['steps']}.")


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The sections and fields of ``EXACT`` in which two recipes differ."""
    return [section for section in EXACT if _at(before, section) != _at(now, section)]


def _at(values: Any, path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
