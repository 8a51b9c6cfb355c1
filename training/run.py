"""One rank of a run, put together from its recipe. Knows nothing of Ray."""

from __future__ import annotations

import copy
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training import checkpoint, loop, parallel, ranks, resume
from training.accounts import Accounts
from training.config import TrainConfig, parse
from training.data.batch import Batch
from training.data.buckets import account
from training.data.dataset import Dataset
from training.data.loader import Loader
from training.ema import Ema
from training.encoding import Watch
from training.evaluate.evaluator import Evaluator
from training.evaluate.held_out import HeldOut
from training.precision import has_bf16
from training.spec import Emit, WorkerSpec, mark
from training.states import RunStates, prepare
from training.step import DiffusionStep, ObjectiveLoss
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
        self.tracker: Tracker | None = None

    def _on_sigterm(self, *_: object) -> None:
        self.asked_to_stop = True  # looked at between steps, so that a checkpoint is of a whole step

    def train(self) -> None:
        """From nothing, or from the newest checkpoint, to the last step."""
        config, spec = self.config, self.spec
        torch.set_num_threads(config.workers.threads)
        parallel.connect(spec.rank, spec.local_rank, spec.world, spec.address, spec.port)
        self.emit(mark("process group joined"))
        self.dataset = ranks.on_every_rank(lambda: Dataset.open(config.data.path, config.data.disk_cache))
        found = ranks.on_rank_zero(self._begin)
        status = "FAILED"
        try:
            done, stopped = self._from(found)
            self.emit({"event": "done", "step": done, "stopped": stopped})
            status = "KILLED" if stopped else "FINISHED"
        finally:
            self._close(status)
        dist.destroy_process_group()

    def _begin(self) -> checkpoint.Checkpoint | None:
        return resume.begin(
            self.config, self.run_dir, self.dataset.hash, warn=self._warn, give_up=lambda: self.asked_to_stop
        )

    def _from(self, found: checkpoint.Checkpoint | None) -> tuple[int, bool]:
        """Returns the steps done, and whether the run was asked to leave before its end."""
        done = found.step if found else 0
        if self._should_stop():
            return done, True
        with ThreadPoolExecutor(1) as beside:  # the server's answers are waited for while the engine is built
            opening = beside.submit(self._track)
            states = prepare(self.dataset, self.config, Watch(self._on_encoding, lambda: self.asked_to_stop))
            if states:
                self.emit(mark("captions encoded"))
                self._build(states)
                self.emit(mark("engine built"))
            ranks.on_rank_zero(opening.result)
        if not states:
            return done, True
        if found:
            self._resume(found)
        if self._should_stop():
            return done, True  # no step was taken: there is nothing to save
        return self._loop(done, found)

    def _track(self) -> None:
        if self.spec.rank == 0 and self.spec.tracking_uri:
            self.tracker = Tracker.open(self._context())

    def _on_encoding(self, done: int, total: int) -> None:
        self.emit({"event": "encoding", "done": done, "total": total})

    def _build(self, states: RunStates) -> None:
        """Network, engine, average and evaluator."""
        config = self.config
        torch.manual_seed(config.seed)  # the fresh weights; every later draw is keyed
        network = config.model.build(text_width=states.unconditional.tokens.shape[-1])
        twin = copy.deepcopy(network)  # before ZeRO 3 takes the weights apart
        module = ObjectiveLoss(network, config.objective)
        self.engine = parallel.Engine(module, config.optimizer, config.engine, config.global_batch)
        if self.spec.rank == 0 and self.engine.precision == "bf16" and not has_bf16():
            self._warn("This machine has no bf16 arithmetic; emulated, it is many times slower than fp32.")
        self.evaluator = Evaluator(
            twin,
            config.objective,
            config.evaluation,
            seed=config.seed,
            resolution=config.model.resolution,
            held_out=HeldOut(self.dataset.split("held_out"), states.measured, states.held_out),
            prompts=states.prompts,
            prompt_states=states.prompt_states,
            unconditional=states.unconditional,
            device=self.engine.device,
            precision=self.engine.precision,
        )
        self.ema = Ema(config.ema, self.engine.owned())
        self.step = DiffusionStep(
            self.engine,
            config.objective,
            states.train,
            states.unconditional,
            self.ema,
            config.schedule,
            config.steps,
            config.seed,
        )

    def _resume(self, found: checkpoint.Checkpoint) -> None:
        """Load a checkpoint."""
        optimizer = found.load("optimizer")
        self.engine.load(found.load("ema"), optimizer)
        self.ema.restart()
        self.engine.load(found.load("weights"), optimizer)
        if self.spec.rank == 0:
            self.emit({"event": "resumed", "step": found.step, "path": str(found.path)})

    def _loop(self, done: int, found: checkpoint.Checkpoint | None) -> tuple[int, bool]:
        config, train = self.config, self.dataset.split("train")
        loader = ranks.on_every_rank(  # a node of its own may have no room for the lists of the buckets
            lambda: Loader.open(
                self.dataset,
                config.data,
                resolution=config.model.resolution,
                global_batch=config.global_batch,
                seed=config.seed,
                rank=self.spec.rank,
                world=self.spec.world,
            )
        )
        if self.spec.rank == 0:
            for line in (account(train.records, loader.schedule.members), loader.account()):
                self.emit({"event": "info", "message": line})
        self.accounts = ranks.on_every_rank(
            lambda: Accounts(self.spec, config, self.dataset, train, loader.skipped, found, self.emit)
        )
        pace = loop.Pace(
            config.steps, config.evaluation.every_steps, config.checkpoint.every_steps, config.global_batch
        )
        hooks = loop.Hooks(self._commit, self._on_step, self._evaluate, self._save)
        self.first = done + 1
        try:
            if done >= config.steps:  # finished before: measure again, so that the caller gets its metrics
                self._evaluate(done)
            return loop.run(self.step, loader.batches(done * config.global_batch), done, pace, hooks)
        finally:
            loader.close()
            self.accounts.close()

    def _commit(self, done: int, batch: Batch) -> bool:
        return self.accounts.commit(done, batch, self.asked_to_stop)

    def _on_step(self, done: int, metrics: Mapping[str, float]) -> None:
        if done == self.first:
            self.emit(mark("first step"))
        if self.spec.rank == 0:
            metrics = {**metrics, "skipped_samples": self.accounts.skipped_samples}
            self.emit({"event": "step", "step": done, "metrics": metrics})
            if self.tracker:
                self.tracker.log_metrics(done, metrics)

    def _evaluate(self, done: int) -> None:
        with self.ema.swapped():
            self.evaluator.load(_strip(self.engine.weights()))
        loss = self.evaluator.held_out_loss()
        metrics = {} if loss is None else {"held_out_loss": loss}
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
        if self.tracker:
            self.tracker.log_metrics(done, metrics)
            if sheet:
                self.tracker.log_image(sheet, "samples", done)

    def _save(self, done: int) -> None:
        weights, optimizer = self.engine.weights(), self.engine.optimizer_state()
        with self.ema.swapped():
            average = self.engine.weights()
        if self.spec.rank == 0:
            use = self.accounts.flushed()  # before the checkpoint that names it
            about = {
                "config": self.config.model_dump(mode="json"),
                "data_hash": self.dataset.hash,
                "code": dict(self.spec.tags),
                "world": self.spec.world,
                "use": use,
            }
            saved = checkpoint.save(
                self.run_dir / "checkpoints",
                step=done,
                position=done * self.config.global_batch,
                groups={"weights": weights, "ema": average, "optimizer": optimizer},
                about=about,
                keep=self.config.checkpoint.keep,
            )
            self.emit({"event": "checkpoint", "step": done, "path": str(saved.path)})
            if self.tracker:
                self.tracker.log_tag("data.use_digest", use["digest"])
        dist.barrier()  # no rank goes on before the state that it may be asked to return to exists

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
        if self.tracker:
            self.emit({"event": "tracked", "run_id": self.tracker.run_id})
            lost = self.tracker.close(status)
            if lost:
                self._warn(f"MLflow did not take {lost} records; the metrics are in {self.run_dir / 'metrics.jsonl'}.")

    def _warn(self, message: str) -> None:
        self.emit({"event": "warning", "message": message})


def _strip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network's own names, without the trained module's prefix."""
    return {name.removeprefix("network."): tensor for name, tensor in weights.items()}
