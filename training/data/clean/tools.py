"""Models and lists that rules need, opened once per process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.clean.config import CleanConfig
from training.data.clean.consent import OptOuts
from training.data.clean.match import Matcher, open_matcher
from training.data.clean.reduced import Reduced
from training.data.clean.unsafe import Scorer, open_scorer
from training.errors import ConfigError

Seer = Callable[[Reduced], np.ndarray]

_FEATURES_PX = 96


@dataclass(frozen=True)
class Tools:
    """What the config asks for, opened; make one per process and use it from as many threads as you like.

    Attributes:
        opt_outs: who opted out.
        unsafe: scores a picture.
        features: float16 features of a picture.
        match: the cosine of a picture and a caption.
    """

    opt_outs: OptOuts
    unsafe: Scorer | None = None
    features: Seer | None = None
    match: Matcher | None = None

    @classmethod
    def of(cls, config: CleanConfig) -> Tools:
        """Open what the rules of ``config`` need, and nothing else: only features and CLIP import torch.

        Raises:
            ConfigError: a list or a model that the config names cannot be read.
        """
        return cls(
            opt_outs=OptOuts.read(config.consent),
            unsafe=open_scorer() if config.unsafe.enabled else None,
            features=_open_features() if config.outliers.enabled else None,
            match=open_matcher(config.match.clip) if config.match.clip else None,
        )


def _open_features() -> Seer:
    import torch

    from training.evaluate.features import EfficientNetFeatures

    network = EfficientNetFeatures()

    def features(picture: Reduced) -> np.ndarray:
        small = picture.squeezed(_FEATURES_PX, Image.Resampling.BICUBIC, gap=2)  # as the network's own resize does
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
        seen: np.ndarray = network(pixels)[0].to(torch.float16).numpy()
        return seen

    return features


def fingerprint(config: CleanConfig) -> str:
    """Sha256 of the config and of the contents of every file that it names: what a verdict depends on besides inputs.

    Raises:
        ConfigError: a file cannot be read.
    """
    seen = hashlib.sha256(config.model_dump_json().encode())
    for path in _named(config):
        try:
            with path.open("rb") as file:
                seen.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ConfigError(
                "A file of the cleaning rules cannot be read.", value=str(path), rule=error.strerror or str(error)
            ) from error
    return seen.hexdigest()


def _named(config: CleanConfig) -> Iterator[Path]:
    consent, clip = config.consent, config.match.clip
    yield from (*consent.opt_out_hashes, *consent.opt_out_domains, *consent.opt_out_creators)
    if clip is not None:
        yield from sorted(path for path in clip.glob("*") if path.suffix in {".json", ".safetensors", ".txt"})
