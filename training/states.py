"""What a run tells its network: the states of all captions that it trains on, measures and shows."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from training import ranks
from training.conditioning import Conditioning
from training.config import TrainConfig
from training.data.dataset import Dataset
from training.data.encoded.place import place_of
from training.data.encoded.text import TextCache, TextJob, release_encoder
from training.embeddings import embed_once
from training.encoding import Watch, together
from training.evaluate.pictures import read_caption, spread


class CaptionStates(Protocol):
    """Where a step finds the states of the captions of its samples."""

    def rows(self, sample_ids: Sequence[int]) -> Conditioning:
        """A row per sample id."""
        ...


@dataclass(frozen=True)
class RunStates:
    """The states of a run's captions.

    Attributes:
        train: of the training split, read as they are needed.
        unconditional: the row of the empty caption.
        prompts: the contact sheet's captions.
        prompt_states: theirs, a row each.
        measured: the ids of the held-out samples that are measured.
        held_out: the states of their captions, a row each.
    """

    train: TextCache
    unconditional: Conditioning
    prompts: Sequence[str]
    prompt_states: Conditioning
    measured: Sequence[int]
    held_out: Conditioning


def prepare(dataset: Dataset, config: TrainConfig, watch: Watch) -> RunStates | None:
    """Open the kept states; what is missing is encoded first, by all ranks together. Every rank calls it.

    Args:
        dataset: of the run.
        config: the recipe.
        watch: who waits meanwhile.

    Returns:
        None where a rank was asked to leave before all was encoded; whole files stay for the next run.

    Raises:
        ConfigError: the encoder is not there.
        StorageError: storage answers with errors.
    """
    job = TextJob(config.text)
    place = place_of(dataset)
    if not together(dataset, job, watch, part=dist.get_rank(), parts=dist.get_world_size()):
        return None
    if place.origin is not None:  # the ranks of other nodes have encoded their share into folders of their own
        nodes = ranks.gather(socket.gethostname())
        here = [rank for rank, node in enumerate(nodes) if node == nodes[dist.get_rank()]]
        if not together(dataset, job, watch, part=here.index(dist.get_rank()), parts=len(here)):
            return None
    release_encoder()
    train = TextCache.open(dataset, "train", config.text)
    prompts = recipe_prompts(config.evaluation.prompts, config.evaluation.images)
    # after the empty caption: a list without captions has states all the same
    ranks.on_rank_zero(lambda: embed_once(place.folder, config.text, ["", *prompts]))
    states = embed_once(place.folder, config.text, ["", *prompts])
    prompt_states = states.rows(slice(1, None))
    if not prompts:  # the data set's own are kept with their shards, so that they are forgotten with them
        split = dataset.split("train")
        shown = evenly(len(split), config.evaluation.images)
        prompts, prompt_states = [read_caption(split, sample_id) for sample_id in shown], train.rows(shown)
    measured = spread(len(dataset.split("held_out")), config.evaluation.held_out_images)
    return RunStates(
        train=train,
        unconditional=states.rows(slice(0, 1)),
        prompts=prompts,
        prompt_states=prompt_states,
        measured=measured,
        held_out=TextCache.open(dataset, "held_out", config.text).rows(measured),
    )


def recipe_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """``count`` captions for the contact sheet, over again where the recipe has fewer; none where it has none."""
    return [prompts[place % len(prompts)] for place in range(count)] if prompts else []


def evenly(samples: int, count: int) -> list[int]:
    """``count`` sample ids, evenly spread, over again where there are fewer samples."""
    different = min(count, samples)
    return [place % different * samples // different for place in range(count)] if different else []
