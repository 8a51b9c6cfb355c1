"""Kept latents: scaled, shifted or drawn otherwise than online, they train a network for another decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from training import noise, ranks
from training.autoencoder import Autoencoder
from training.data.augment import AugmentConfig
from training.data.dataset import Dataset
from training.data.encoded.latent_reader import LatentReader
from training.data.encoded.latents import LatentsJob
from training.data.pixels import PixelReader
from training.encoding import Watch, together
from training.latents_config import LatentsConfig
from training.self_tests.finding import Finding, failed, measured
from training.self_tests.ground import Ground
from training.self_tests.pictures import SIDE, pictures

SEED, EPOCH = 3, 1
TOLERANCE = 1e-3
"""Of a latent of deviation 1, kept in fp32: sums of another order, of other batches."""
MEND = "remove the data set's folder of kept latents, so that they are made anew; look at training.data.encoded"


def check(ground: Ground) -> Finding:
    """Every kept latent of a tiny autoencoder against encoding its picture now, with the same draws."""
    place, vae = ranks.on_rank_zero(lambda: (str(pictures(ground.folder)), str(_autoencoder(ground.folder / "vae"))))
    dataset = ranks.on_every_rank(lambda: Dataset.open(place))
    job = LatentsJob(LatentsConfig(autoencoder=vae, dtype="fp32"), SIDE)
    together(dataset, job, Watch(lambda _done, _all: None, lambda: False), part=ground.rank, parts=ground.world)
    kept = LatentReader.open(dataset, "train", job, AugmentConfig(), seed=SEED)
    pixels = PixelReader(dataset.split("train"), AugmentConfig(), seed=SEED, scaled=True, cache_mb=0)
    online = Autoencoder(Path(vae))
    ids = range(ground.rank, len(dataset.split("train")), ground.world)
    mine = max((_gap(kept, pixels, online, sample) for sample in ids), default=0.0)
    gaps = ranks.gather(mine)
    if not ids:
        return failed("latents", f"rank {ground.rank} had no sample to look at", "fewer workers")
    detail = f"{len(dataset.split('train'))} latents within {max(gaps):.1e} of encoding the picture now"
    return measured("latents", max(gaps), TOLERANCE, detail, MEND)


def _gap(kept: LatentReader, pixels: PixelReader, online: Autoencoder, sample: int) -> float:
    """The largest difference of any value of a sample's latent."""
    row = np.zeros(kept.row_shape(SIDE, SIDE), dtype=np.float32)
    kept.read(sample, EPOCH, row)
    picture = np.zeros(pixels.row_shape(SIDE, SIDE), dtype=np.uint8)
    pixels.read(sample, EPOCH, picture)
    clean = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    moments = online.moments(clean)[0]
    posterior = noise.normal(SEED, EPOCH, sample, "posterior", shape=(online.space.channels, *row.shape[:2]))
    drawn = online.space.draw(moments, posterior)
    return float((torch.from_numpy(row).permute(2, 0, 1) - drawn).abs().max())


def _autoencoder(folder: Path) -> Path:
    """A tiny ``AutoencoderKL`` of random weights, its latents of a deviation of about 1."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=1.7,
            shift_factor=0.1,
        )
    model.save_pretrained(folder)
    return folder
