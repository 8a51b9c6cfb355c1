"""One rank of a run, put together from its recipe. Knows nothing of Ray."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training import loop, parallel, ranks, resume
from training.accounts import Accounts
from training.build import build
from training.checkpoint.keeper import Keeper, Where
from training.config import TrainConfig, parse
from training.data.batch import Batch
from training.data.buckets import account
from training.data.dataset import Dataset
from training.ema_snapshots import Snapshots
from training.encoding import Watch
from training.errors import DarkroomError
from training.guards import Guard, LeftOut
from training.latents import open_loader
from training.left_out import LeftOutLog
from training.out_of_memory import SaysWhatFits
from training.precision import has_bf16
from training.run_meter import RunMeter
from training.spec import Emit, WorkerSpec, mark
from training.stall import StallWatch
from training.states import RunStates, prepare
from training.stopwatch import Stopwatch
from training.tracking import RunContext, Tracker


class Run:
    """One rank of a run."""

    def __init__(self, spec: WorkerSpec, emit: Emit) -> None:
        self.asked_to_stop = False
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # one that came earlier arrives now
        self.spec, self.emit = spec, emit
        self.config: TrainConfig = parse(spec.config)
        self.run_dir = Path(spec.run_dir)
        self._opening: Future[Tracker | None] | None = None
        self.stopping = False
        self.measured: tuple[int, Mapping[str, float]] = (0, {})

    def _on_sigterm(self, *_: object) -> None:
        self.asked_to_stop = True  # looked at between steps, so that a checkpoint is of a whole step

    def train(self) -> None:
        """From nothing, or from the newest checkpoint, to the last step."""
        config, spec = self.config, self.spec
        torch.set_num_threads(config.workers.threads)
        parallel.connect(spec.rank, spec.local_rank, spec.world, spec.address, spec.port)
        self.emit(mark("process group joined"))
        self.dataset = ranks.on_every_rank(lambda: Dataset.open(config.data.path, config.data.disk_cache))
        beginning = ranks.on_rank_zero(self._begin)
        status = "FAILED"
        try:
            done, stopped = self._from(beginning)
            self.emit({"event": "done", "step": done, "stopped": stopped})
            status = "KILLED" if stopped else "FINISHED"
        finally:
            self._close(status)
        dist.destroy_process_group()

    def _begin(self) -> resume.Beginning | None:
        return resume.begin(
            self.config, self.run_dir, self.dataset.hash, warn=self._warn, give_up=lambda: self.asked_to_stop
        )

    def _from(self, beginning: resume.Beginning | None) -> tuple[int, bool]:
        """Returns the steps done, and whether the run was asked to leave before its end."""
        if beginning is None:
            return 0, True
        place = resume.Place(self.run_dir, self.dataset.hash, self.spec.rank, self.spec.world)
        found, memory = resume.settle(beginning, self.config, place, self._warn)
        done = found.step if found else 0
        at_risk = found is not None and not found.durable  # in memory alone, it is lost with the node
        if self._should_stop() and not at_risk:
            return done, True
        beside = ThreadPoolExecutor(1)  # the server's answers are waited for while the engine is built
        self._opening = beside.submit(self._track)
        beside.shutdown(wait=False)
        states = prepare(self.dataset, self.config, Watch(self._on_encoding, lambda: self.asked_to_stop))
        if not states:
            return done, True
        self.emit(mark("captions encoded"))
        self._build(states)
        self.emit(mark("engine built"))
        if not found or found.durable:  # a killed process is replaced at once: the server has answered before
            ranks.on_rank_zero(lambda: self.tracker is None)
        where = Where(beginning.folder, self.spec.rank, self.spec.world, beginning.attempt)
        self.keeper = Keeper(where, self.config.checkpoint, self.engine, self.ema, memory, self._warn)
        self.snapshots = Snapshots(self.config.ema.post_hoc, self.config.steps, self.run_dir, where)
        if found:
            self._resume(found)
        if self._should_stop() and not at_risk:
            return done, True  # no step was taken: there is nothing to save
        outcome = self._loop(done, found)
        self.snapshots.close()
        self._tell_written()
        self.keeper.close(ended=True)
        return outcome

    @property
    def tracker(self) -> Tracker | None:
        """Rank 0's, once the server has answered."""
        return self._opening.result() if self._opening else None

    def _track(self) -> Tracker | None:
        return Tracker.open(self._context()) if self.spec.rank == 0 and self.spec.tracking_uri else None

    def _on_encoding(self, done: int, total: int) -> None:
        self.emit({"event": "encoding", "done": done, "total": total})

    def _build(self, states: RunStates) -> None:
        parts = build(self.config, self.dataset, states)
        self.engine, self.ema, self.evaluator, self.step = parts.engine, parts.ema, parts.evaluator, parts.step
        if self.spec.rank == 0 and self.engine.precision == "bf16" and not has_bf16():
            self._warn("This machine has no bf16 arithmetic; emulated, it is many times slower than fp32.")

    def _resume(self, found: resume.State) -> None:
        if found.durable:
            self.keeper.take(found.durable.source())
        else:
            self.keeper.restore(found.step)
        if self.spec.rank == 0:
            self.emit({"event": "resumed", "step": found.step, "path": found.place, "memory": not found.durable})

    def _loop(self, done: int, found: resume.State | None) -> tuple[int, bool]:
        config, train = self.config, self.dataset.split("train")
        loader = ranks.on_every_rank(  # a node of its own may have no room for the lists of the buckets
            lambda: open_loader(config, self.dataset, self.spec.rank, self.spec.world)
        )
        if self.spec.rank == 0:
            for line in (account(train.records, loader.schedule.members), loader.account()):
                self.emit({"event": "info", "message": line})
        self.accounts = ranks.on_every_rank(
            lambda: Accounts(
                self.spec, config, self.dataset, train, loader.skipped, found.about["use"] if found else None, self.emit
            )
        )
        pace = loop.Pace(
            config.steps, config.evaluation.every_steps, config.checkpoint.every_steps, config.global_batch
        )
        self.guard = Guard(config.guards, found.about.get("guards") if found else None)
        noted = ranks.on_every_rank(lambda: LeftOutLog(self.run_dir, self.spec.rank, done, self.emit))
        hooks = loop.Hooks(
            keep=self.keeper.keep,
            restore=self.keeper.restore,
            rewind=self.keeper.rewind,
            note=noted.note,
            commit=self._commit,
            on_step=self._on_step,
            evaluate=self._evaluate,
            save=self._save,
        )
        clock = Stopwatch(self.engine.device.type == "cuda")
        self.meter = RunMeter(config, self.spec, self.engine.device, clock, done, self.emit, self._log)
        self.first = done + 1
        try:
            self._catch_up(done, found)
            batches = loader.batches(done * config.global_batch)
            step = SaysWhatFits(self.step, config, self.spec.world, self.engine.device)
            place = (self.run_dir, self.spec.rank, self.spec.world)
            with StallWatch(config.guards, clock, *place, self.emit, self.first), self.meter:
                return loop.run(step, batches, done, pace, hooks, self.guard, clock)
        except DarkroomError:  # the message may say that what was saved before is kept
            self.keeper.close(ended=False)  # before the account that a checkpoint needs is closed
            raise
        finally:
            loader.close()
            self.accounts.close()

    def _catch_up(self, done: int, found: resume.State | None) -> None:
        """What a killed process was about to do after its last whole step."""
        from_memory, last = found is not None and not found.durable, done >= self.config.steps
        if found:  # a snapshot is written beside the checkpoint of its step, and may be the later one
            self.snapshots.keep(done, self.ema.tracked)
        # finished before: measured again, so that the caller gets its metrics
        if last or (from_memory and done % self.config.evaluation.every_steps == 0):
            self._evaluate(done)
        due = last or done % self.config.checkpoint.every_steps == 0
        if from_memory and due:  # there is no checkpoint of this step that is whole, or it would be gone on from
            self._save(done, wait=last)

    def _commit(self, done: int, batch: Batch, left_out: LeftOut | None) -> bool:
        self.stopping = self.accounts.commit(done, batch, left_out, self.asked_to_stop)
        if not self.accounts.behind:
            self.keeper.commit(done, {"use": self.accounts.state(), "guards": self.guard.state()})
        return self.stopping

    def _log(self, done: int, metrics: Mapping[str, float]) -> None:
        if self.tracker:
            self.tracker.log_metrics(done, metrics)

    def _on_step(self, done: int, metrics: Mapping[str, float]) -> None:
        if done == self.first:
            self.emit(mark("first step"))
        self.snapshots.keep(done, self.ema.tracked)
        metrics = self.meter.on_step(done, metrics)
        if self.spec.rank == 0:
            self._tell_written()
            metrics = {**metrics, "skipped_samples": self.accounts.skipped_samples}
            self.emit({"event": "step", "step": done, "metrics": metrics})
            self._log(done, metrics)

    def _evaluate(self, done: int) -> None:
        self.evaluator.load(_strip(self.ema.whole()))
        loss = self.evaluator.held_out_loss()
        metrics = {} if loss is None else {"held_out_loss": loss}
        self.measured = (done, metrics)
        # every rank tells, because Ray Train wants a report of every worker
        self.emit({"event": "evaluation", "step": done, "metrics": metrics})
        sheet = self.evaluator.contact_sheet() if self.evaluator.prompts else None
        if self.spec.rank != 0:
            return
        if sheet:
            path = self.run_dir / "samples" / f"step-{done:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path)
            self.emit({"event": "samples", "step": done, "path": str(path)})
        self._log(done, metrics)
        self.meter.on_evaluation(done)
        if self.tracker and sheet:
            self.tracker.log_image(sheet, "samples", done)

    def _save(self, done: int, *, wait: bool | None = None) -> None:
        about = {
            "config": self.config.model_dump(mode="json"),
            "data_hash": self.dataset.hash,
            "code": dict(self.spec.tags),
            "world": self.spec.world,
            "use": self.accounts.state(),
            "guards": self.guard.state(),
        }
        measured_at, metrics = self.measured
        self.keeper.save(
            done,
            done * self.config.global_batch,
            metrics if measured_at == done else {},
            about,
            first=self.accounts.flush,
            wait=done == self.config.steps or self.stopping if wait is None else wait,
        )
        self._tell_written()

    def _tell_written(self) -> None:
        """Of the checkpoints that have come to exist beside the steps."""
        for saved in self.keeper.written() if self.spec.rank == 0 else ():
            self.emit({"event": "checkpoint", "step": saved.step, "path": saved.path})
            if self.tracker:
                self.tracker.log_tag("data.use_digest", saved.about["use"]["digest"])

    def _should_stop(self) -> bool:
        return bool(ranks.total(self.asked_to_stop)[0])

    def _context(self) -> RunContext:
        return RunContext(
            uri=self.spec.tracking_uri,
            experiment=self.config.tracking.experiment,
            name=self.config.name,
            run_dir=self.run_dir,
            config=self.config.model_dump(mode="json"),
            tags=self.spec.tags,
            dataset_path=self.config.data.path,
            dataset_hash=self.dataset.hash,
            parent_run_id=self.spec.parent_run_id,
        )

    def _close(self, status: Any) -> None:
        if self._opening and not self._opening.exception() and self.tracker:
            self.emit({"event": "tracked", "run_id": self.tracker.run_id})
            lost = self.tracker.close(status)
            if lost:
                self._warn(f"MLflow did not take {lost} records; the metrics are in {self.run_dir / 'metrics.jsonl'}.")

    def _warn(self, message: str) -> None:
        self.emit({"event": "warning", "message": message})


def _strip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network's own names, without the trained module's prefix."""
    return {name.removeprefix("network."): tensor for name, tensor in weights.items()}
