"""What a run tells its network: the states of all captions that it trains on, measures and shows."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from training import ranks
from training.conditioning import (
    ClassConfig,
    Conditioning,
    ConditioningConfig,
    ConditioningShape,
    NoEncoder,
    NothingConfig,
    encoder_for,
    encoder_shape,
)
from training.config import TrainConfig
from training.data.dataset import Dataset
from training.data.encode import Job
from training.data.encoded.classes import ClassCache, ClassJob
from training.data.encoded.place import place_of
from training.data.encoded.text import TextCache, TextJob, release_encoder
from training.data.manifest import SplitName
from training.embeddings import embed_once
from training.encoding import Watch, together
from training.evaluate.pictures import read_caption, spread
from training.latents import latents_job


class CaptionStates(Protocol):
    """Where a step finds what the network is told about its samples."""

    def rows(self, sample_ids: Sequence[int]) -> Conditioning:
        """A row per sample id."""
        ...


@dataclass(frozen=True)
class RunStates:
    """The states of a run's captions, or its classes.

    Attributes:
        shape: of every row.
        train: of the training split, read as they are needed.
        unconditional: the row of the empty caption.
        prompts: the contact sheet's captions.
        prompt_states: theirs, a row each.
        measured: the ids of the held-out samples that are measured.
        held_out: the states of their captions, a row each.
    """

    shape: ConditioningShape
    train: CaptionStates
    unconditional: Conditioning
    prompts: Sequence[str]
    prompt_states: Conditioning
    measured: Sequence[int]
    held_out: Conditioning


class Uninformed:
    """The rows of a network that is told nothing."""

    def rows(self, sample_ids: Sequence[int]) -> Conditioning:
        """A row per sample."""
        return NoEncoder().encode([""] * len(sample_ids))


def prepare(dataset: Dataset, config: TrainConfig, watch: Watch) -> RunStates | None:
    """Open what is kept of captions and of latents; what is missing is encoded first, by all ranks together.

    Every rank calls it.

    Args:
        dataset: of the run.
        config: the recipe.
        watch: who waits meanwhile.

    Returns:
        None where a rank was asked to leave before all was encoded; whole files stay for the next run.

    Raises:
        ConfigError: an encoder is not there, or does not fit the data set.
        StorageError: storage answers with errors.
    """
    for job in jobs_of(config):
        if not _encode(dataset, job, watch):
            return None
    release_encoder()
    told = config.conditioning
    train = open_states(dataset, "train", told)
    prompts = recipe_prompts(config.evaluation.prompts, config.evaluation.images)
    # after the empty caption: a list without captions has states all the same
    ranks.on_rank_zero(lambda: _embed(dataset, told, ["", *prompts]))
    states = _embed(dataset, told, ["", *prompts])
    prompt_states = states.rows(slice(1, None))
    if not prompts:  # the data set's own are kept with their shards, so that they are forgotten with them
        split = dataset.split("train")
        shown = evenly(len(split), config.evaluation.images)
        prompts, prompt_states = [read_caption(split, sample_id) for sample_id in shown], train.rows(shown)
    measured = spread(len(dataset.split("held_out")), config.evaluation.held_out_images)
    return RunStates(
        shape=encoder_shape(told, dataset),
        train=train,
        unconditional=states.rows(slice(0, 1)),
        prompts=prompts,
        prompt_states=prompt_states,
        measured=measured,
        held_out=open_states(dataset, "held_out", told).rows(measured),
    )


def jobs_of(config: TrainConfig) -> list[Job]:
    """What a run of a recipe reads encoded."""
    told, jobs = config.conditioning, list[Job]()
    if isinstance(told, ClassConfig):
        jobs.append(ClassJob(told))
    elif not isinstance(told, NothingConfig):
        jobs.append(TextJob(told))
    latents = latents_job(config)
    return jobs if latents is None else [*jobs, latents]


def open_states(dataset: Dataset, split: SplitName, told: ConditioningConfig) -> CaptionStates:
    """The rows of a split's samples, kept by the job of their kind.

    Raises:
        ConfigError: the encoder is not there, or does not fit the data set.
        StorageError: storage answers with errors.
    """
    if isinstance(told, NothingConfig):
        return Uninformed()
    if isinstance(told, ClassConfig):
        return ClassCache.open(dataset, split, told)
    return TextCache.open(dataset, split, told)


def _embed(dataset: Dataset, told: ConditioningConfig, captions: Sequence[str]) -> Conditioning:
    if isinstance(told, ClassConfig | NothingConfig):
        encoder = encoder_for(told, dataset)
        for caption in captions:
            encoder.check(caption)
        return encoder.encode(captions)
    return embed_once(place_of(dataset).folder, told, captions)


def _encode(dataset: Dataset, job: Job, watch: Watch) -> bool:
    """Encode what is missing, by all ranks together; False where a rank was asked to leave before all was there."""
    if not together(dataset, job, watch, part=dist.get_rank(), parts=dist.get_world_size()):
        return False
    if place_of(dataset).origin is None:
        return True
    # the ranks of other nodes have encoded their share into folders of their own
    nodes = ranks.gather(socket.gethostname())
    here = [rank for rank, node in enumerate(nodes) if node == nodes[dist.get_rank()]]
    return together(dataset, job, watch, part=here.index(dist.get_rank()), parts=len(here))


def recipe_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """``count`` captions for the contact sheet, over again where the recipe has fewer; none where it has none."""
    return [prompts[place % len(prompts)] for place in range(count)] if prompts else []


def evenly(samples: int, count: int) -> list[int]:
    """``count`` sample ids, evenly spread, over again where there are fewer samples."""
    different = min(count, samples)
    return [place % different * samples // different for place in range(count)] if different else []
