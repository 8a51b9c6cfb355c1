"""What our training is measured beside: a bare PyTorch loop, alone and in stock Ray Train, and accelerate's way.

``python -m tests.benchmarks.overhead_peers bare|stock|accelerate RECIPE OUT PORT`` trains the recipe's network on the
batches of its data set, read beforehand, and leaves the moment of every step and the final weights in the folder OUT.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.benchmarks.overhead import MALLOC
from training import models
from training.conditioning import Conditioning
from training.config import TrainConfig, load_recipe
from training.data.batch import Batch
from training.data.dataset import Dataset
from training.encoding import Watch
from training.latents import canvas_of, open_loader
from training.objectives import Draws
from training.parallel import connect
from training.precision import resolve
from training.states import RunStates, prepare
from training.step import as_clean


@dataclass
class Moments:
    """When each step ended, and how long its forward and backward took, where that is told."""

    ended_s: list[float] = field(default_factory=list)
    floor_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """All that a loop needs, in memory: reading it costs the peers nothing.

    Attributes:
        config: the recipe.
        network: with the weights that every loop starts from.
        rows: of each step: pictures, what is told of them, and the random numbers.
    """

    config: TrainConfig
    network: torch.nn.Module
    rows: list[tuple[torch.Tensor, Conditioning, Draws]]


def prepared(recipe: str) -> Prepared:
    """The same network, seed and batches as ours has."""
    config = load_recipe(recipe)
    torch.set_num_threads(config.workers.threads)
    dataset = Dataset.open(config.data.path)
    states = prepare(dataset, config, Watch(lambda _done, _total: None, lambda: False))
    if states is None:
        raise RuntimeError("the captions have states before a benchmark begins")
    torch.manual_seed(config.seed)
    canvas = canvas_of(config)
    network = config.model.build(states.shape, canvas.channels, canvas.factor)
    loader = open_loader(config, dataset, 0, 1)
    batches = loader.batches(0)
    rows = [_rows(config, states, next(batches)) for _ in range(config.steps)]
    loader.close()
    return Prepared(config, network, rows)


def _rows(config: TrainConfig, states: RunStates, batch: Batch) -> tuple[torch.Tensor, Conditioning, Draws]:
    clean = as_clean(batch.images, torch.device("cpu")).clone()
    ids = list(batch.sample_ids)
    draws = config.objective.draw(config.seed, list(batch.epochs), ids, tuple(clean.shape[1:]))
    return clean, states.train.rows(ids).where(draws.keep_caption, states.unconditional), draws


def bare(ready: Prepared, done: Callable[[], None], moments: Moments) -> None:
    """Nothing but PyTorch."""
    config, network = ready.config, ready.network
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    weights = list(network.parameters())
    half = resolve(config.engine.precision) == "bf16"

    def predict(x: torch.Tensor, t: torch.Tensor, told: Conditioning) -> torch.Tensor:
        return models.apply(network, x, t, told)

    for step, (clean, told, draws) in enumerate(ready.rows):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * config.schedule.factor(step, config.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = config.objective.loss(predict, clean, told, draws).mean()
        loss.backward()
        moments.floor_s.append(time.perf_counter() - began)
        torch.nn.utils.clip_grad_norm_(weights, config.engine.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        done()


def accelerated(ready: Prepared, done: Callable[[], None], _: Moments) -> None:
    """The loop of diffusers' ``examples/unconditional_image_generation/train_unconditional.py``, with its defaults.

    Its network is ours, its batches too; noise, times, average, schedule and the order of things are its own.
    """
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    config = ready.config
    half = resolve(config.engine.precision) == "bf16"
    accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision="bf16" if half else "no", cpu=True)
    average = EMAModel(ready.network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(ready.network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rates = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=config.steps)
    network, optimizer, rates = accelerator.prepare(ready.network, optimizer, rates)
    inner = accelerator.unwrap_model(network)
    for clean, told, _ in ready.rows:
        noise = torch.randn(clean.shape)
        times = torch.randint(0, 1000, (len(clean),)).long()
        noisy = scheduler.add_noise(clean, noise, times)
        with accelerator.accumulate(network):
            with accelerator.autocast():
                answer = models.apply(inner, noisy, times / 1000, told)
            loss = torch.nn.functional.mse_loss(answer.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(network.parameters())
        loss.detach().item()
        done()


def train(side: str, recipe: str, out: Path, port: int) -> None:
    """Train, and leave what was measured."""
    connect(0, 0, 1, "127.0.0.1", port)  # preparing captions is what ranks do together
    moments = Moments()
    ready = prepared(recipe)
    loops: dict[str, Any] = {"bare": bare, "accelerate": accelerated}
    with (out / "ended_s").open("w", buffering=1) as log:

        def done() -> None:
            moments.ended_s.append(time.time())
            log.write(f"{moments.ended_s[-1]}\n")

        loops[side](ready, done, moments)
    save_file({name: tensor.detach() for name, tensor in ready.network.named_parameters()}, out / "weights.safetensors")
    (out / "moments.json").write_text(json.dumps({"ended_s": moments.ended_s, "floor_s": moments.floor_s}))


def in_stock_ray_train(recipe: str, out: Path, port: int) -> None:
    """The bare loop, as Ray's documentation has one run."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    def loop() -> None:
        from tests.benchmarks.overhead_peers import train

        train("bare", recipe, out, port)

    ray.init(log_to_driver=False, runtime_env={"env_vars": {**MALLOC, "PYTHONPATH": str(Path.cwd())}})
    run_config = RunConfig(storage_path=str(out / "ray"))
    DataParallelTrainer(loop, scaling_config=ScalingConfig(num_workers=1), run_config=run_config).fit()


def main() -> None:
    """Train in the way that was asked for."""
    side, recipe, out, port = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    if side == "stock":
        in_stock_ray_train(recipe, out, port)
    else:
        train(side, recipe, out, port)


if __name__ == "__main__":
    main()
