"""One rank of a run, put together from its recipe. Knows nothing of Ray."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training import checkpoint, loop, parallel
from training.config import TrainConfig, parse
from training.data.dataset import Dataset, Split
from training.data.loader import Loader
from training.ema import Ema
from training.embeddings import embed_once, ensure_embedded
from training.errors import CheckpointError, DarkroomError
from training.evaluate.evaluator import Evaluator, read_split
from training.precision import has_bf16
from training.spec import Emit, WorkerSpec, mark
from training.step import DiffusionStep, ObjectiveLoss
from training.tracking import RunContext, Tracker

EXACT = ("seed", "global_batch", "model", "text", "objective", "optimizer", "schedule", "ema")
"""Sections that a run cannot change on its way."""


class Run:
    """One rank of a run."""

    def __init__(self, spec: WorkerSpec, emit: Emit) -> None:
        self.spec, self.emit = spec, emit
        self.config: TrainConfig = parse(spec.config)
        self.run_dir = Path(spec.run_dir)
        self.asked_to_stop = False
        self.tracker: Tracker | None = None
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: object) -> None:
        self.asked_to_stop = True  # looked at after the step, so that the checkpoint is of a whole step

    def train(self) -> None:
        """From nothing, or from the newest checkpoint, to the last step."""
        config, spec = self.config, self.spec
        torch.set_num_threads(config.workers.threads)
        parallel.connect(spec.rank, spec.local_rank, spec.world, spec.address, spec.port)
        self.emit(mark("process group joined"))
        self.dataset = Dataset.open(config.data.path)
        found = self._newest()
        status = "FAILED"
        try:
            with ThreadPoolExecutor(1) as beside:  # the server's answers are waited for while the engine is built
                opening = beside.submit(self._track)
                self._build()
                self.emit(mark("engine built"))
                self._on_rank_zero(opening.result)
            done = self._resume(found) if found else 0
            stopped = self._loop(done)
            status = "KILLED" if stopped else "FINISHED"
        finally:
            self._close(status)
        dist.destroy_process_group()

    def _on_rank_zero(self, action: Callable[[], object]) -> None:
        """Rank 0 acts, and every rank hears how it went: all go on, or all raise the same error."""
        outcome: list[Any] = [None]
        if self.spec.rank == 0:
            try:
                action()
            except DarkroomError as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome)
        if outcome[0] is not None:
            raise outcome[0]

    def _track(self) -> None:
        if self.spec.rank == 0 and self.spec.tracking_uri:
            self.tracker = Tracker.open(self._context())

    def _build(self) -> None:
        """Captions, network, engine, average and evaluator."""
        config = self.config
        train, held_out = self.dataset.split("train"), self.dataset.split("held_out")
        prompts = list(config.evaluation.prompts) or _spread(train, config.evaluation.images)
        prompts = [prompts[i % len(prompts)] for i in range(config.evaluation.images)] if prompts else []
        # the data set's own captions apart from the recipe's prompts, so that trials share their states
        # (each after the empty caption: a list without captions has states all the same)
        lists = [["", *prompts], ["", *_captions(train)], ["", *_captions(held_out)]]
        cache = Path(config.data.path) / "embeddings"
        self._on_rank_zero(lambda: [ensure_embedded(cache, config.text, captions) for captions in lists])
        states = [embed_once(cache, config.text, captions) for captions in lists]
        prompt_states, self.captions, held_out_states = (each.rows(slice(1, None)) for each in states)
        unconditional = states[0].rows(slice(0, 1))
        torch.manual_seed(config.seed)  # the fresh weights; every later draw is keyed
        network = config.model.build(text_width=unconditional.tokens.shape[-1])
        twin = copy.deepcopy(network)  # before ZeRO 3 takes the weights apart
        module = ObjectiveLoss(network, config.objective)
        self.engine = parallel.Engine(module, config.optimizer, config.engine, config.global_batch)
        if self.spec.rank == 0 and self.engine.precision == "bf16" and not has_bf16():
            message = "This machine has no bf16 arithmetic; emulated, it is many times slower than fp32."
            self.emit({"event": "warning", "message": message})
        images, readable = read_split(held_out, config.model.resolution)
        self.evaluator = Evaluator(
            twin,
            config.objective,
            config.evaluation,
            seed=config.seed,
            images=images,
            held_out=held_out_states.rows(readable),
            prompts=prompts,
            prompt_states=prompt_states,
            unconditional=unconditional,
            device=self.engine.device,
            precision=self.engine.precision,
        )
        self.ema = Ema(config.ema, self.engine.owned())
        self.step = DiffusionStep(
            self.engine,
            config.objective,
            self.captions,
            unconditional,
            self.ema,
            config.schedule,
            config.steps,
            config.seed,
        )

    def _newest(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint, of this recipe and data; None for a fresh run."""
        found, refused = checkpoint.newest(self.run_dir / "checkpoints")
        if self.spec.rank == 0:
            for reason in refused:
                self.emit({"event": "warning", "message": f"A checkpoint was passed over. {reason}"})
        if found is None:
            return None
        self._check_recipe(found)
        if found.about["data_hash"] != self.dataset.hash:
            raise CheckpointError(
                "The run was trained on another data set.",
                value=self.dataset.hash,
                rule=f"data hash {found.about['data_hash']}, as in {found.path}",
                mend="give the run another name, or the data set that it began with",
            )
        return found

    def _resume(self, found: checkpoint.Checkpoint) -> int:
        """Load a checkpoint; returns the steps done."""
        optimizer = found.load("optimizer")
        self.engine.load(found.load("ema"), optimizer)
        self.ema.restart()
        self.engine.load(found.load("weights"), optimizer)
        if self.spec.rank == 0:
            self.emit({"event": "resumed", "step": found.step, "path": str(found.path)})
        return found.step

    def _check_recipe(self, found: checkpoint.Checkpoint) -> None:
        """What shapes the weights must be as it was; how and where it is computed may change."""
        before, now = found.about["config"], self.config.model_dump(mode="json")
        for section in EXACT:
            if before.get(section) != now[section]:
                raise CheckpointError(
                    f"The run {self.config.name} began with another recipe: {section} has changed.",
                    value=now[section],
                    rule=f"{section} as in {found.path}: {before.get(section)}",
                    mend="give the run another name with --set name=..., or the recipe that it began with",
                )
        if before["steps"] != now["steps"] and self.config.schedule.kind != "constant" and self.spec.rank == 0:
            message = f"The learning rate was laid out for {before['steps']} steps and is now for {now['steps']}."
            self.emit({"event": "warning", "message": message})

    def _loop(self, done: int) -> bool:
        config = self.config
        loader = Loader(
            self.dataset.split("train"),
            resolution=config.model.resolution,
            global_batch=config.global_batch,
            seed=config.seed,
            rank=self.spec.rank,
            world=self.spec.world,
            prefetch=config.data.prefetch,
            cache_mb=config.data.cache_mb,
        )
        pace = loop.Pace(
            config.steps, config.evaluation.every_steps, config.checkpoint.every_steps, config.global_batch
        )
        hooks = loop.Hooks(self._on_step, self._evaluate, self._save, self._should_stop)
        self.first = done + 1
        try:
            if done >= config.steps:  # finished before: measure again, so that the caller gets its metrics
                self._evaluate(done)
            done, stopped = loop.run(self.step, loader.batches(done * config.global_batch), done, pace, hooks)
        finally:
            loader.close()
        self.emit({"event": "done", "step": done, "stopped": stopped})
        return stopped

    def _on_step(self, done: int, metrics: Mapping[str, float]) -> None:
        if done == self.first:
            self.emit(mark("first step"))
        if self.spec.rank == 0:
            self.emit({"event": "step", "step": done, "metrics": dict(metrics)})
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
            about = {
                "config": self.config.model_dump(mode="json"),
                "data_hash": self.dataset.hash,
                "code": dict(self.spec.tags),
                "world": self.spec.world,
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
        dist.barrier()  # no rank goes on before the state that it may be asked to return to exists

    def _should_stop(self) -> bool:
        asked = torch.tensor([float(self.asked_to_stop)], device=self.engine.device)
        dist.all_reduce(asked)
        return bool(asked.item())

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
                message = f"MLflow did not take {lost} records; the metrics are in {self.run_dir / 'metrics.jsonl'}."
                self.emit({"event": "warning", "message": message})


def _spread(split: Split, count: int) -> list[str]:
    """``count`` captions, evenly spread over a split."""
    total = min(count, len(split))
    return [split.caption(i * len(split) // total) for i in range(total)]


def _captions(split: Split) -> list[str]:
    return [split.caption(i) for i in range(len(split))]


def _strip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network's own names, without the trained module's prefix."""
    return {name.removeprefix("network."): tensor for name, tensor in weights.items()}
