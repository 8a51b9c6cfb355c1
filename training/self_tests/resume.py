"""Going on: a state that was kept without something, or brought back in another order, trains on and is another run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file

from training import ranks
from training.checkpoint import CheckpointConfig
from training.checkpoint.keeper import Keeper, Where
from training.checkpoint.memory import NodeMemory
from training.checkpoint.verified import newest_together
from training.data.storage import Folder
from training.ema import Ema, EmaConfig
from training.parallel import Engine
from training.self_tests.finding import Finding, failed, measured
from training.self_tests.ground import Ground

MIDDLE, STEPS = 3, 6
STAGES = (1, 3)
AVERAGE = EmaConfig(decay=0.9)
MEND = "do not rely on resuming here: look at /dev/shm, at the run folder's storage, and at training.checkpoint"


@dataclass
class Trained:
    """A run in miniature.

    Attributes:
        engine: trained.
        average: of its weights.
        keeper: keeps both.
        warned: what it said.
    """

    engine: Engine
    average: Ema
    keeper: Keeper
    warned: list[str] = field(default_factory=list)

    @classmethod
    def fresh(cls, ground: Ground, stage: int) -> Trained:
        """At its start, with what an earlier process has kept."""
        engine = ground.engine(stage)
        average = ground.average(engine, AVERAGE)
        run_dir = ground.folder / f"zero-{stage}"
        memory = NodeMemory.open(run_dir, ground.rank, {"self-test": stage})
        warned: list[str] = []
        where = Where(Folder.at(run_dir / "checkpoints"), ground.rank, ground.world, "self-test")
        kept = None if isinstance(memory, str) else memory
        if isinstance(memory, str):
            warned.append(memory)
        return cls(engine, average, Keeper(where, CheckpointConfig(), engine, average, kept, warned.append), warned)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and average, whole."""
        named = {"weights": self.engine.whole("weights"), "ema": self.average.whole()}
        return {f"{group}/{name}": tensor for group, whole in named.items() for name, tensor in whole.items()}


def prepare(ground: Ground) -> None:
    """Train without a break; in the middle, keep the state in storage and in the node's memory."""
    for stage in STAGES:
        run = Trained.fresh(ground, stage)

        def after(step: int, run: Trained = run) -> None:
            run.average.update(step)
            if step + 1 == MIDDLE:
                run.keeper.keep(MIDDLE)
                run.keeper.commit(MIDDLE, {})
                run.keeper.save(MIDDLE, MIDDLE * ground.global_batch, {}, {}, first=lambda: None, wait=True)

        losses = ground.train(run.engine, 0, STEPS, after)
        state = run.state()
        if ground.rank == 0:
            save_file(state, ground.folder / f"zero-{stage}.safetensors")
            (ground.folder / f"zero-{stage}.json").write_text(json.dumps(losses[MIDDLE:]))


def check(ground: Ground) -> Finding:
    """Go on from either, in other processes: the losses and the final state must be the same, bit for bit."""
    gaps: dict[str, float] = {}
    for stage in STAGES:
        run = Trained.fresh(ground, stage)
        kept = ranks.gather(run.keeper.memory is not None and MIDDLE in run.keeper.memory.steps)
        if not all(kept):
            why = "; ".join(sorted({line for told in ranks.gather(run.warned) for line in told})) or "nothing was kept"
            return failed("resume", f"no state in the memory of rank {kept.index(False)}'s node: {why}", MEND)
        run.keeper.restore(MIDDLE)
        gaps[f"node memory, ZeRO {stage}"] = _gap(ground, run, stage)
        run.keeper.close(ended=True)
        run = Trained.fresh(ground, stage)
        found, refused = newest_together(Folder.at(ground.folder / f"zero-{stage}" / "checkpoints"))
        if found is None:
            return failed("resume", f"no checkpoint in the run's folder {'; '.join(refused)}", MEND)
        run.keeper.take(found.source())
        gaps[f"storage, ZeRO {stage}"] = _gap(ground, run, stage)
        run.keeper.close(ended=True)
    worst = max(gaps, key=lambda name: gaps[name])
    detail = f"losses, weights and averages after going on from {'; '.join(gaps)} differ by {gaps[worst]:.1e}"
    return measured("resume", gaps[worst], 0.0, f"{detail} at most ({worst})" if gaps[worst] else detail, MEND)


def _gap(ground: Ground, run: Trained, stage: int) -> float:
    """The largest difference, of losses or final state, to the run without a break; infinite for a missing part."""
    losses = ground.train(run.engine, MIDDLE, STEPS, run.average.update)
    wanted = json.loads((ground.folder / f"zero-{stage}.json").read_text())
    expected, state = load_file(ground.folder / f"zero-{stage}.safetensors"), run.state()
    if set(expected) != set(state):
        return float("inf")
    gaps = [abs(a - b) for a, b in zip(losses, wanted, strict=True)]
    gaps += [float((state[name] - tensor).abs().max()) for name, tensor in expected.items()]
    return float(max(ranks.gather(max(gaps))))
