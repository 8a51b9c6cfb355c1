"""The parts of one rank, put together from a recipe: network, engine, average, evaluator and step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training import parallel
from training.conditioning import Conditioning
from training.config import TrainConfig
from training.data.dataset import Dataset
from training.ema import Ema
from training.evaluate.evaluator import Evaluator
from training.evaluate.held_out import HeldOut
from training.evaluate.held_out_latents import HeldOutLatents
from training.finetune.network import starting_network
from training.latents import canvas_of, latents_job
from training.models import mup
from training.states import RunStates
from training.step import DiffusionStep, ObjectiveLoss


@dataclass(frozen=True)
class Parts:
    """What a rank trains with.

    Attributes:
        engine: the network, the optimizer and their shards.
        ema: the averaged weights.
        evaluator: measures a copy of the network.
        step: one optimizer step.
    """

    engine: parallel.Engine
    ema: Ema
    evaluator: Evaluator
    step: DiffusionStep


def build(config: TrainConfig, dataset: Dataset, states: RunStates) -> Parts:
    """Build the parts with fresh weights. Every rank calls it.

    Args:
        config: the recipe.
        dataset: what is trained on.
        states: of its captions.
    """
    torch.manual_seed(config.seed)  # the fresh weights; every later draw is keyed
    canvas = canvas_of(config)
    network = starting_network(config, states.shape, canvas.channels, canvas.factor)
    rates = mup.transferred(
        network, config.model, lambda base: base.build(states.shape, canvas.channels, canvas.factor)
    )
    twin = copy.deepcopy(network)  # before ZeRO 3 takes the weights apart
    module = ObjectiveLoss(network, config.objective)
    scales = {f"network.{name}": rate for name, rate in rates.items()}
    engine = parallel.Engine(module, config.optimizer, config.engine, config.global_batch, scales)
    evaluator = Evaluator(
        twin,
        config.objective,
        config.evaluation,
        seed=config.seed,
        canvas=canvas,
        held_out=held_out_of(config, dataset, states.measured, states.held_out),
        prompts=states.prompts,
        prompt_states=states.prompt_states,
        unconditional=states.unconditional,
        device=engine.device,
        precision=engine.precision,
    )
    ema = Ema(config.ema, engine.weights, engine.device, engine.average_into)
    step = DiffusionStep(
        engine,
        config.objective,
        states.train,
        states.unconditional,
        ema,
        config.schedule,
        config.steps,
        config.seed,
        config.global_batch,
    )
    return Parts(engine, ema, evaluator, step)


def held_out_of(config: TrainConfig, dataset: Dataset, sample_ids: Sequence[int], told: Conditioning) -> HeldOut:
    """The held-out samples that are measured, as the network sees them.

    Args:
        config: the recipe.
        dataset: what is trained on; its latents are encoded, where the network sees latents.
        sample_ids: which, by their index in the split.
        told: what the network is told about them, a row each.
    """
    job = latents_job(config)
    latents = None if job is None else HeldOutLatents(dataset, job)
    return HeldOut(dataset.split("held_out"), sample_ids, told, latents)
