"""``python -m tests.gpu.mfu``: images/s, MFU and data wait of DiT-XL/2 on 256 px latents, bf16, on one card.

The run is ``darkroom train``'s: pictures are drawn here, encoded once by a tiny autoencoder of random weights, and read
back as every run reads kept latents. MFU is the run's own metric: the network's products, the backward pass counted
twice, over the card's peak. The peer is fast-DiT's published 24.5% on an A100.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from cluster import stack as stacks
from cluster.console import say
from tests.benchmarks.report import parser, publish, row
from training.data.build import build
from training.data.config import BuildConfig

PICTURES, WARM_STEPS = 1024, 20
FAST_DIT_MFU = 0.245


def pictures(folder: Path) -> Path:
    """A data set of 256 px pictures."""
    source = folder / "drawn"
    source.mkdir()
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((256, 256), Image.Resampling.NEAREST).save(buffer, "PNG")
        (source / f"{number:04d}.png").write_bytes(buffer.getvalue())
        (source / f"{number:04d}.txt").write_text(f"class {number % 10}")
    build(source, folder / "data", BuildConfig(held_out=0.02))
    return folder / "data"


def autoencoder(folder: Path) -> Path:
    """A tiny one with the latents of Stable Diffusion's: four channels, an eighth of the side."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.0,
    )
    model.save_pretrained(folder / "vae")
    return folder / "vae"


def recipe(folder: Path, batch: int, steps: int) -> Path:
    """DiT-XL/2 (Peebles and Xie 2023, table 1)."""
    values = {
        "base": "base",
        "name": "mfu",
        "steps": steps,
        "global_batch": batch,
        "data": {"path": str(pictures(folder))},
        "model": {"family": "dit", "resolution": 256, "patch": 2, "layers": 28, "heads": 16, "head_width": 72},
        "conditioning": {"kind": "class"},
        "latents": {"autoencoder": str(autoencoder(folder))},
        "engine": {"precision": "bf16", "compile": "blocks"},
        "workers": {"count": 1, "gpus": 1},
        "evaluation": {"every_steps": 10**6, "images": 0, "held_out_images": 8},
        "checkpoint": {"every_steps": 10**6, "memory_every_steps": 0},
    }
    path = folder / "mfu.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def main() -> None:
    """Measure and report."""
    made = parser(__doc__ or "")
    made.add_argument("--batch", type=int, default=128, help="rows of a step")
    made.add_argument("--steps", type=int, default=100, help=f"of the run; the first {WARM_STEPS} do not count")
    options = made.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tests.gpu.mfu needs an NVIDIA GPU that torch can use")
    card = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="dr-") as folder:
        home = Path(folder)
        written = recipe(home, options.batch, options.steps)
        stacks.use(stacks.ensure(home, say))
        try:
            environment = {**os.environ, "DARKROOM_HOME": str(home)}
            subprocess.run([sys.executable, "-m", "cluster", "train", str(written)], env=environment, check=True)
            lines = [json.loads(line) for line in (home / "runs" / "mfu" / "metrics.jsonl").read_text().splitlines()]
        finally:
            stacks.stop(home)
    steps = [line for line in lines if "learning_rate" in line][WARM_STEPS:]
    rates = [line["images_per_s"] for line in steps]
    shares = [line["mfu"] for line in steps if "mfu" in line]
    waits = [line["time/data_s"] * line["images_per_s"] / options.batch for line in steps]
    name = f"DiT-XL/2, 256 px latents, bf16, batch {options.batch}, {card}"
    publish(
        [
            row(name, "images/s", rates, [], "", "-", True),
            row(f"{name}: MFU", "", shares, [FAST_DIT_MFU], "fast-DiT on an A100", ">= 0.5", np.median(shares) >= 0.5),
            row(f"{name}: waiting for data", "of a step", waits, [], "", "< 0.005", float(np.median(waits)) < 0.005),
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
