"""A step that diverges ends the run with its reason, on every rank, before a checkpoint is made of it; and a sample
that cannot be read leaves no trace in a step."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training import checkpoint
from training.noise import normal
from training.objectives import Draws, RectifiedFlow
from training.step import ObjectiveLoss, as_clean


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_what_diverges_stops_in_words(runs: Any, tmp_path: Path, zero_stage: int) -> None:
    config = runs.config(
        optimizer={"learning_rate": 1e30},
        schedule={"kind": "constant", "warmup_steps": 0},
        engine={"zero_stage": zero_stage},
        checkpoint={"every_steps": 1},
        evaluation={"images": 0},
    )
    ranks = runs.start(config, "diverging", world=2)
    assert [rank.end() for rank in ranks] == [1, 1]
    told = [rank.told("error") for rank in ranks]
    (error,) = told[0]
    assert told[1][0]["message"] == error["message"], "both ranks see the same"
    assert error["typed"]
    assert "Training has diverged at step 2." in error["message"]
    assert "optimizer.learning_rate" in error["message"]
    found, refused = checkpoint.newest(tmp_path / "diverging" / "checkpoints")
    assert found is not None
    assert (found.step, refused) == (1, []), "the step that diverged is not kept"


def test_averaged_weights_that_diverge_are_never_measured(runs: Any) -> None:
    # the weights are gone after the first step, but its own loss and gradient were those of the fresh network
    config = runs.config(
        steps=1,
        optimizer={"learning_rate": 1e38},
        schedule={"kind": "constant", "warmup_steps": 0},
        evaluation={"images": 0},
    )
    (rank,) = runs.start(config, "gone")
    assert rank.end() == 1
    (error,) = rank.told("error")
    assert "The held-out loss is not a number" in error["message"]
    assert not rank.told("evaluation")


class Convolution(ObjectiveLoss):
    """A network of one layer, which looks at nothing but the pictures."""

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:  # noqa: ARG002  as its base
        found: torch.Tensor = self.network(x)
        return found


@pytest.mark.parametrize("missing", [(1,), (0, 3), (0, 1, 2, 3)])
def test_a_row_that_is_not_valid_has_no_gradient_and_the_others_keep_theirs(missing: tuple[int, ...]) -> None:
    """The sum of the readable rows' own gradients over the rows of the batch, whatever the missing ones hold."""
    objective = RectifiedFlow()
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    loss = Convolution(network, objective)
    shape = (3, 8, 8)
    clean = normal(0, "clean", shape=(4, *shape)).clamp(-1, 1)
    draws = objective.draw(0, [0] * 4, [5, 6, 7, 8], shape)

    def gradient(rows: list[int], valid: list[bool], pictures: torch.Tensor) -> tuple[float, torch.Tensor]:
        part = Draws(draws.t[rows], draws.noise[rows], draws.keep_caption[rows])
        network.zero_grad()
        value = loss(pictures[rows], None, part, torch.tensor(valid).float())
        value.backward()
        assert network.weight.grad is not None
        return float(value.detach()), network.weight.grad.clone()

    kept = [row for row in range(4) if row not in missing]
    alone = [gradient([row], [True], clean) for row in kept]
    for filling in (0.0, 1.0):
        pictures = clean.clone()
        pictures[list(missing)] = filling
        value, found = gradient([0, 1, 2, 3], [row not in missing for row in range(4)], pictures)
        assert value == pytest.approx(sum(each for each, _ in alone) / 4, abs=1e-6)
        expected = sum((each for _, each in alone), torch.zeros_like(found)) / 4
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_pixels_become_numbers_around_zero_and_latents_stay() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 8, 8, 4).permute(0, 3, 1, 2)
    values = as_clean(pixels, torch.device("cpu"))
    assert values.dtype == torch.float32
    assert values.is_contiguous()
    assert (float(values.min()), float(values.max())) == (-1, 1)
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), pixels)
    latents = normal(0, "latents", shape=(2, 4, 4, 4))
    assert torch.equal(as_clean(latents, torch.device("cpu")), latents)


@dataclass(frozen=True)
class Shared:
    """What the ranks of a world have told, and the weights at the end."""

    everyone: list[list[dict[str, float]]]
    sections: list[str]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, warm: Any) -> dict[int, Shared]:
    """Three steps of the same global batches in worlds of one to four real processes."""
    out = tmp_path_factory.mktemp("shares")
    warm.run("share_ranks", out)
    found = {}
    for world in (1, 2, 3, 4):
        told = json.loads((out / f"{world}.json").read_text())
        found[world] = Shared(told["everyone"], told["sections"], load_file(out / f"{world}.safetensors"))
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_uneven_shares_train_as_the_whole_batch_does(worlds: dict[int, Shared], world: int) -> None:
    """Seven rows over two, three and four ranks, two of the samples missing."""
    found, alone = worlds[world], worlds[1]
    assert all(told == found.everyone[0] for told in found.everyone), "every rank tells the same bits"
    for ours, theirs in zip(found.everyone[0], alone.everyone[0], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=5e-5, rtol=1e-4)
    assert {"forward", "backward", "communication", "optimizer"} <= set(found.sections)
