"""The checks that a config may name, loaded."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any, assert_never

from PIL import Image

from serving.safety import Finding, ImageCheck, PromptCheck, Safety, allow
from serving.safety_config import (
    ImageCheckConfig,
    ImageModelCheck,
    NoCheck,
    OpenNsfwCheck,
    PromptCheckConfig,
    SafetyConfig,
    TextModelCheck,
    WordCheck,
)
from training.errors import ConfigError

_FILES = ("config.json", "*.safetensors")
_CHECKER = "StableDiffusionSafetyChecker"


def load_safety(config: SafetyConfig) -> Safety:
    """Both checks.

    Raises:
        ConfigError: a model is missing or does not load.
    """
    return Safety(_prompts(config.prompts), _images(config.images))


def _prompts(config: PromptCheckConfig) -> PromptCheck:
    match config:
        case NoCheck():
            return allow
        case WordCheck():
            return _words(config)
        case TextModelCheck():
            return _text_model(config)
        case _:
            assert_never(config)


def _images(config: ImageCheckConfig) -> ImageCheck:
    match config:
        case NoCheck():
            return allow
        case OpenNsfwCheck():
            return _open_nsfw(config)
        case ImageModelCheck():
            return _image_model(config)
        case _:
            assert_never(config)


def _words(config: WordCheck) -> PromptCheck:
    """Whole words, however they are written: Unicode's compatible forms and cases are one."""
    choices = "|".join(re.escape(" ".join(_plain(word).split())).replace(r"\ ", r"[\W_]+") for word in config.words)
    listed = re.compile(rf"(?<!\w)(?:{choices})(?!\w)")
    rule = f"none of the {len(config.words)} words that this server's operator lists"

    def check(prompt: str) -> Finding | None:
        return Finding(rule) if listed.search(_plain(prompt)) else None

    return check


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _open_nsfw(config: OpenNsfwCheck) -> ImageCheck:
    from training.data.clean.unsafe import open_scorer

    scorer = open_scorer()

    def check(image: Image.Image) -> Finding | None:
        score = scorer(image)
        return None if score < config.threshold else Finding(f"an Open-NSFW score under {config.threshold:g}", score)

    return check


def _text_model(config: TextModelCheck) -> PromptCheck:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    directory = _directory(config.directory)
    model, tokenizer = _loaded(
        directory,
        lambda: (
            AutoModelForSequenceClassification.from_pretrained(directory, local_files_only=True, use_safetensors=True),
            AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False),
        ),
    )
    refused = _label_ids(model, config.labels, directory)
    longest = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 512)))

    @torch.no_grad()
    def check(prompt: str) -> Finding | None:
        # what is longer than the model reads is read in pieces: nothing hides at a prompt's end
        pieces = tokenizer(
            prompt,
            truncation=True,
            max_length=longest,
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
        )
        pieces.pop("overflow_to_sample_mapping", None)
        score = float(model(**pieces).logits.softmax(-1)[:, refused].max())
        return _labelled(score, config.labels, config.threshold)

    return check


def _image_model(config: ImageModelCheck) -> ImageCheck:
    directory = _directory(config.directory)
    from transformers import AutoConfig

    kinds = _loaded(directory, lambda: AutoConfig.from_pretrained(directory, local_files_only=True)).architectures or []
    return _diffusers_checker(directory) if _CHECKER in kinds else _classifier(config, directory)


def _diffusers_checker(directory: Path) -> ImageCheck:
    """Diffusers' own, which compares CLIP's view of a picture with that of unsafe words; its thresholds are inside."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    model, processor = _loaded(
        directory,
        lambda: (
            StableDiffusionSafetyChecker.from_pretrained(directory, local_files_only=True, use_safetensors=True).eval(),
            CLIPImageProcessorPil.from_pretrained(directory, local_files_only=True),
        ),
    )

    @torch.no_grad()
    def check(image: Image.Image) -> Finding | None:
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        _, unsafe = model(images=pixels, clip_input=pixels)  # it blackens what it is given
        return Finding("nothing that diffusers' safety checker knows") if unsafe[0] else None

    return check


def _classifier(config: ImageModelCheck, directory: Path) -> ImageCheck:
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model, processor = _loaded(
        directory,
        lambda: (
            AutoModelForImageClassification.from_pretrained(directory, local_files_only=True, use_safetensors=True),
            AutoImageProcessor.from_pretrained(directory, local_files_only=True),
        ),
    )
    refused = _label_ids(model, config.labels, directory)

    @torch.no_grad()
    def check(image: Image.Image) -> Finding | None:
        logits = model(**processor(images=[image], return_tensors="pt")).logits[0]
        return _labelled(float(logits.softmax(-1)[refused].max()), config.labels, config.threshold)

    return check


def _labelled(score: float, labels: tuple[str, ...], threshold: float) -> Finding | None:
    return None if score < threshold else Finding(f"{', '.join(labels)} under {threshold:g}", score)


def _label_ids(model: Any, labels: tuple[str, ...], directory: Path) -> list[int]:
    known = {str(name): int(number) for name, number in model.config.label2id.items()}
    if not labels or not set(labels) <= set(known):
        raise ConfigError(
            "The safety model does not have these labels.",
            value=list(labels),
            rule=f"one or more labels of {directory}",
            options=sorted(known),
        )
    model.eval()
    return [known[label] for label in labels]


def _directory(text: str) -> Path:
    """A model's directory.

    Raises:
        ConfigError: a file is missing; weights that would have to be unpickled do not count.
    """
    directory = Path(text).expanduser()
    for pattern in _FILES:
        if not any(directory.glob(pattern)):
            raise _does_not_load(directory, f"no {pattern} in it")
    return directory


def _loaded(directory: Path, load: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise _does_not_load(directory, next(iter(str(error).splitlines()), type(error).__name__)) from error


def _does_not_load(directory: Path, reason: str) -> ConfigError:
    return ConfigError(
        "The safety model cannot be loaded.",
        value=str(directory),
        rule=reason,
        options=("config.json", "model.safetensors", "preprocessor_config.json or the tokenizer's files"),
        mend="name a directory that the model's save_pretrained wrote, with its processor",
    )
