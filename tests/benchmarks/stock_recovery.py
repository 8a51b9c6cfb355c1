"""The peer of the recovery benchmark: the same small loop with checkpoints the way Ray's documentation shows it.

Rank 1's process, which with stock Ray Train is the Ray worker, is killed once. What is saved are weights and the step
without the optimizer's state, so that the peer has less to do.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

STEPS = 300
KILL_AT = 30
SAVE_EVERY = 20
ROWS = 4


def loop(config: dict[str, str]) -> None:
    """Train the recipe's network on noise."""
    import ray.train
    import ray.train.torch
    import torch
    from safetensors.torch import load_file, save_file

    from training.conditioning import Conditioning, ConditioningShape
    from training.config import load_recipe
    from training.step import ObjectiveLoss

    torch.set_num_threads(1)
    recipe = load_recipe(config["recipe"], [f"data.path={config['folder']}"])
    network = recipe.model.build(ConditioningShape("text", 12, 384), 3, 1)
    first, found = 0, ray.train.get_checkpoint()
    if found:
        with found.as_directory() as folder:
            network.load_state_dict(load_file(Path(folder) / "weights.safetensors"))
            first = int((Path(folder) / "step").read_text())
    trained = ray.train.torch.prepare_model(ObjectiveLoss(network, recipe.objective))
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-3)
    rank = ray.train.get_context().get_world_rank()
    (Path(config["folder"]) / f"pid-{rank}").write_text(str(os.getpid()))
    told = Conditioning(torch.zeros(ROWS, 12, 384), torch.ones(ROWS, 12, dtype=torch.bool))
    shape = (3, recipe.model.resolution, recipe.model.resolution)
    for step in range(first + 1, STEPS + 1):
        draws = recipe.objective.draw(0, [step] * ROWS, list(range(ROWS)), shape)
        loss = trained(torch.randn(ROWS, *shape), told, draws, torch.ones(ROWS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            with (Path(config["folder"]) / "steps").open("a") as log:
                log.write(f"{step} {time.time()} {os.getpid()}\n")
        if step % SAVE_EVERY == 0:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = None
                if rank == 0:
                    save_file(network.state_dict(), Path(folder) / "weights.safetensors")
                    (Path(folder) / "step").write_text(str(step))
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"loss": float(loss.detach())}, checkpoint=checkpoint)


def steps_done(folder: Path) -> list[tuple[int, float, int]]:
    """The steps that rank 0 has done so far, when, and in which process."""
    log = folder / "steps"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [line.split() for line in lines if line.endswith("\n")]
    return [(int(step), float(time_s), int(process)) for step, time_s, process in whole]


def main(recipe: str, folder: Path) -> None:
    """Train, kill, and print the seconds to the next new step and the steps done again."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    folder.mkdir(parents=True)
    ray.init(log_to_driver=False)
    killed_s: list[float] = []

    def kill() -> None:
        while not (done := steps_done(folder)) or done[-1][0] < KILL_AT:
            time.sleep(0.01)
        killed_s.append(time.time())
        os.kill(int((folder / "pid-1").read_text()), 9)

    threading.Thread(target=kill, daemon=True).start()
    TorchTrainer(
        loop,
        train_loop_config={"recipe": recipe, "folder": str(folder)},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.45}),
        run_config=ray.train.RunConfig(
            storage_path=str(folder / "ray"), failure_config=ray.train.FailureConfig(max_failures=3)
        ),
    ).fit()
    done = steps_done(folder)
    best = max(step for step, _, process in done if process == done[0][2])
    came_s = next(time_s for step, time_s, process in done if step > best and process != done[0][2])
    print("RECOVERY", came_s - killed_s[0], len(done) - len({step for step, *_ in done}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
