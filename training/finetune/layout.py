"""The parts of a diffusers pipeline directory, looked at without loading any; read without torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from training.errors import ConfigError
from training.finetune.files import PICKLED

_INDEX = "model_index.json"
Kind = Literal["sd", "sdxl", "sd3", "flux", "pixart", "sana"]


@dataclass(frozen=True)
class Layout:
    """What the pipelines of a kind are made of.

    Attributes:
        kind: our word for it.
        network: the part that is trained, and its class.
        autoencoder: the class of the part ``vae``.
        encoders: classes that each text encoder may have, by the name of the part; its tokenizer has the same ending.
        optional: text encoders that a pipeline may leave out.
    """

    kind: Kind
    network: tuple[str, str]
    autoencoder: str
    encoders: dict[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()


_CLIP, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
_T5 = ("T5EncoderModel",)
_FLUX = Layout(
    "flux",
    ("transformer", "FluxTransformer2DModel"),
    "AutoencoderKL",
    {"text_encoder": (_CLIP,), "text_encoder_2": _T5},
)
_PIXART = Layout("pixart", ("transformer", "PixArtTransformer2DModel"), "AutoencoderKL", {"text_encoder": _T5})
LAYOUTS = {
    "StableDiffusionPipeline": Layout(
        "sd", ("unet", "UNet2DConditionModel"), "AutoencoderKL", {"text_encoder": (_CLIP,)}
    ),
    "StableDiffusionXLPipeline": Layout(
        "sdxl",
        ("unet", "UNet2DConditionModel"),
        "AutoencoderKL",
        {"text_encoder": (_CLIP,), "text_encoder_2": (_PROJECTED,)},
    ),
    "StableDiffusion3Pipeline": Layout(
        "sd3",
        ("transformer", "SD3Transformer2DModel"),
        "AutoencoderKL",
        {"text_encoder": (_PROJECTED,), "text_encoder_2": (_PROJECTED,), "text_encoder_3": _T5},
        optional=("text_encoder_3",),
    ),
    "FluxPipeline": _FLUX,
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "SanaPipeline": Layout(
        "sana",
        ("transformer", "SanaTransformer2DModel"),
        "AutoencoderDC",
        {"text_encoder": ("Gemma2Model", "Gemma2ForCausalLM", "GemmaModel", "LlamaModel")},
    ),
}
"""The pipelines that can be trained further, by diffusers' name: all that is ever loaded."""

CLIP_TOKENS = 77
_T5_TOKENS: dict[Kind, int] = {"sd3": 256, "flux": 512, "pixart": 120, "sana": 300}
"""As diffusers' pipelines pad."""

_LIBRARIES = ("diffusers", "transformers")
_PART = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""What names a part, and the folder of it that is copied into a bundle: nothing outside the pipeline."""


@dataclass(frozen=True)
class Pipeline:
    """A pipeline directory whose parts are all there.

    Attributes:
        directory: where it is.
        name: diffusers' name of its class.
        layout: what it is made of.
        encoders: the text encoders that it has.
    """

    directory: Path
    name: str
    layout: Layout
    encoders: tuple[str, ...]

    @classmethod
    def read(cls, directory: Path) -> Pipeline:
        """Look at a pipeline's parts.

        Raises:
            ConfigError: it is no pipeline, of no known layout, or a part is missing, of another class, or pickled.
        """
        index = _json(directory / _INDEX)
        if index is None:
            raise ConfigError(
                "This is no diffusers pipeline.",
                value=str(directory),
                rule=f"a directory with a {_INDEX}",
                options=_pipelines_below(directory),
            )
        name = str(index.get("_class_name"))
        layout = LAYOUTS.get(name)
        if layout is None:
            raise ConfigError(
                "This pipeline cannot be trained further.", value=name, rule="one of", options=list(LAYOUTS)
            )
        _require_inside(directory, index)
        part, network = layout.network
        _require(directory, index, part, (network,))
        _require(directory, index, "vae", (layout.autoencoder,))
        _require(directory, index, "scheduler", ())
        present = []
        for encoder, classes in layout.encoders.items():
            if encoder in layout.optional and index.get(encoder, [None, None])[1] is None:
                continue
            _require(directory, index, encoder, classes)
            _require(directory, index, encoder.replace("text_encoder", "tokenizer"), ())
            present.append(encoder)
        return cls(directory, name, layout, tuple(present))

    @cached_property
    def index(self) -> dict[str, Any]:
        """``model_index.json``."""
        return _json(self.directory / _INDEX) or {}

    @property
    def kind(self) -> Kind:
        """Our word for its layout."""
        return self.layout.kind

    @property
    def network_at(self) -> Path:
        """Directory of the part that is trained."""
        return self.directory / self.layout.network[0]

    def config(self, part: str) -> dict[str, Any]:
        """A part's own config.

        Raises:
            ConfigError: it has none.
        """
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        found = _json(self.directory / part / name)
        if found is None:
            raise _missing(self.directory, part, f"a {name}")
        return found

    @cached_property
    def network(self) -> dict[str, Any]:
        """The config of the part that is trained."""
        return self.config(self.layout.network[0])


def factor_of(autoencoder: dict[str, Any]) -> int:
    """Pixels of a picture's side for one value of its latent, by the autoencoder's config."""
    levels = autoencoder.get("encoder_block_out_channels") or autoencoder.get("block_out_channels") or [64]
    return int(2 ** (len(levels) - 1))


def default_tokens(pipeline: Pipeline) -> int:
    """Tokens of the longest caption that the pipeline's last encoder reads."""
    if pipeline.name == "PixArtSigmaPipeline":
        return 300
    return _T5_TOKENS.get(pipeline.kind, CLIP_TOKENS)


def _require_inside(directory: Path, index: dict[str, Any]) -> None:
    strange = sorted(part for part in index if not _PART.fullmatch(part))
    if strange:
        raise ConfigError(
            f"The pipeline's {_INDEX} names a part by no name.",
            value=strange[0],
            rule="letters, digits and underscores, the name of a folder in the pipeline",
            mend=f"remove its line from {directory / _INDEX}, if you trust the rest",
        )


def _require(directory: Path, index: dict[str, Any], part: str, classes: tuple[str, ...]) -> None:
    """Refuse a part that is not there whole, or is not what the layout says.

    A network has classes that it may have; a scheduler and a tokenizer are small files without weights.
    """
    library, name = index.get(part) or (None, None)
    folder = directory / part
    if name is None or not folder.is_dir():
        raise _missing(directory, part, f"the directory {part}, and its line in {_INDEX}")
    if library not in _LIBRARIES or (classes and name not in classes):
        raise ConfigError(
            f"The pipeline's part {part} is none that is loaded.",
            value=f"{library}.{name}",
            rule="a class of diffusers or transformers; code of the pipeline's own is not run",
            options=classes or _LIBRARIES,
        )
    if not classes:
        if not any(folder.iterdir()):
            raise _missing(directory, part, "files in it")
        return
    if not (folder / "config.json").is_file():
        raise _missing(directory, part, "a config.json")
    found = [path.name for path in folder.iterdir()]
    if not any(name.endswith(".safetensors") for name in found):
        pickled = sorted(name for name in found if name.endswith(PICKLED))
        if not pickled:
            raise _missing(directory, part, "weights as safetensors")
        raise ConfigError(
            f"The pipeline's part {part} has pickled weights only.",
            value=str(folder / pickled[0]),
            rule="safetensors weights: reading a pickle can run anything",
            mend="DiffusionPipeline.from_pretrained(...).save_pretrained(DIR), where you trust them",
        )
    _require_shards(folder, part)


def _require_shards(folder: Path, part: str) -> None:
    for listing in folder.glob("*.safetensors.index*.json"):
        named = set((_json(listing) or {}).get("weight_map", {}).values())
        lost = sorted(name for name in named if not (folder / name).is_file())
        if lost:
            raise _missing(folder.parent, part, f"{', '.join(lost[:3])}, named in {listing.name}")


def _missing(directory: Path, part: str, rule: str) -> ConfigError:
    return ConfigError(
        f"The pipeline's part {part} is not whole.",
        value=str(directory / part),
        rule=rule,
        mend="fetch the pipeline again: huggingface_hub.snapshot_download goes on where it stopped",
    )


def _pipelines_below(directory: Path) -> list[str]:
    return sorted(str(path.parent) for path in directory.glob(f"*/{_INDEX}"))[:5] if directory.is_dir() else []


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
