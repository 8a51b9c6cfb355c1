"""Textual inversion: a pipeline's network behind its own text encoders, which learn the embeddings of a new word.

Gal et al. 2022, "An Image is Worth One Word", eq. 2: of network and encoders nothing is trained. The network is told
numbers of tokens, and encodes them itself, so that gradients reach the embeddings.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.conditioning.told import Conditioning
from training.errors import ConfigError
from training.finetune.files import load_part
from training.finetune.inversion_tokens import tokenizers_of, word_ids
from training.finetune.layout import CLIP_TOKENS, Pipeline
from training.noise import normal

if TYPE_CHECKING:
    from training.finetune.encoder import PipelineEncoder
    from training.finetune.inversion_config import InversionConfig
    from training.finetune.inversion_tokens import TokenEncoder

FILE = "learned_embeds.safetensors"
"""What diffusers looks for in a directory; ComfyUI reads it by its path."""
_JITTER = 0.01
"""Of the initial embedding's spread: vectors that begin as equals would stay equals."""
_NAMES = ("clip_l", "clip_g")
"""SDXL's two encoders, as ComfyUI names them."""


class NewWords(torch.nn.Module):
    """A frozen embedding, in which some rows are others.

    Args:
        known: the encoder's own embedding.
        numbers: of the tokens that have other rows.
        vectors: those rows, ``[numbers, width]``.
    """

    def __init__(self, known: torch.nn.Embedding, numbers: list[int], vectors: torch.Tensor) -> None:
        super().__init__()
        self.known, self.numbers = known, numbers
        self.vectors = torch.nn.Parameter(vectors)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``[B, tokens, width]`` of ``[B, tokens]`` numbers."""
        rows: torch.Tensor = self.known(ids.clamp(max=self.known.num_embeddings - 1))
        for place, number in enumerate(self.numbers):
            rows = torch.where((ids == number)[..., None], self.vectors[place].to(rows.dtype), rows)
        return rows


class TextualInversion(torch.nn.Module):
    """A network that is told numbers of tokens, a column for each encoder.

    Args:
        network: the pipeline's.
        encoders: its text encoders, in its order.
        words: the embedding of each.
    """

    def __init__(self, network: Any, encoders: list[Any], words: list[NewWords]) -> None:
        super().__init__()
        self.network, self.encoders = network, torch.nn.ModuleList(encoders)
        self.requires_grad_(False)
        for encoder, each in zip(encoders, words, strict=True):
            encoder.set_input_embeddings(each)
            each.vectors.requires_grad_(True)

    @property
    def learnt(self) -> list[torch.Tensor]:
        """The embeddings of the word, for each encoder ``[vectors, width]``, on the CPU."""
        encoders: list[Any] = list(self.encoders)
        every = [encoder.get_input_embeddings().vectors for encoder in encoders]
        return [vectors.detach().float().cpu().contiguous() for vectors in every]

    def told(self, numbers: Conditioning) -> Conditioning:
        """What diffusers' pipeline makes of these tokens; of a row of -1, zeros."""
        ids = numbers.tokens.round().long()
        real = (ids >= 0).all(-1)
        if len(self.encoders) == 1:
            return Conditioning(self.encoders[0](ids[..., 0])[0], numbers.mask)
        made = [
            encoder(ids[..., place].clamp(min=0), output_hidden_states=True)
            for place, encoder in enumerate(self.encoders)
        ]
        tokens = torch.cat([each.hidden_states[-2] for each in made], -1) * real[..., None]
        return Conditioning(tokens, numbers.mask, made[-1][0] * real[:, :1])


def invert(network: Any, pipeline: Pipeline, config: InversionConfig) -> TextualInversion:
    """Put a pipeline's encoders before its network, with a new word that begins as another.

    Args:
        network: the pipeline's; under ``torch.device("meta")`` no weights of the encoders are read either.
        pipeline: that the run starts from.
        config: the recipe's section.

    Raises:
        ConfigError: an encoder does not load, or its tokenizer knows the word already, or not the initial one.
    """
    encoders: list[Any] = []
    words: list[NewWords] = []
    for name, tokenizer in zip(pipeline.encoders, tokenizers_of(pipeline), strict=True):
        encoder = _encoder(pipeline, name)
        numbers = word_ids(tokenizer, config)
        known = encoder.get_input_embeddings()
        like = tokenizer(config.initial_token, add_special_tokens=False)["input_ids"]
        if not like:
            raise ConfigError(
                "The pipeline's tokenizer reads nothing in this word.",
                value=config.initial_token,
                rule="adapter.initial_token is a word that it knows",
            )
        start = known.weight.detach()[like].mean(0)
        jitter = normal(0, "word", name, shape=(len(numbers), start.numel()))
        jitter[0] = 0
        encoders.append(encoder)
        words.append(NewWords(known, numbers, start + _JITTER * start.std() * jitter.to(start.device)))
    return TextualInversion(network, encoders, words)


def _encoder(pipeline: Pipeline, name: str) -> Any:
    import transformers

    folder, kind = pipeline.directory / name, getattr(transformers, pipeline.index[name][1])
    if torch.empty(1).is_meta:
        return kind(kind.config_class.from_pretrained(folder))
    return load_part(kind, folder, "The pipeline's encoder", dtype=torch.float32)


def write_words(out: Path, network: TextualInversion, encoder: TokenEncoder) -> PipelineEncoder:
    """Write the word into a written pipeline's encoders and tokenizers, and for other pipelines into ``adapter/``.

    ``learned_embeds.safetensors`` is read by ``pipe.load_textual_inversion(DIR)`` and as a file by ComfyUI; for SDXL it
    has the tensors ``clip_l`` and ``clip_g``, each of which diffusers takes by itself, with its encoder and tokenizer.

    Args:
        out: where ``write_pipeline`` has written the pipeline.
        network: as it was trained.
        encoder: gave it its numbers.

    Returns:
        The encoder of what was written: prompts to states.
    """
    from safetensors.torch import save_file

    from training.finetune.encoder import PipelineEncoder

    pipeline, config, learnt = encoder.pipeline, encoder.inverted, network.learnt
    for name, tokenizer, vectors in zip(pipeline.encoders, tokenizers_of(pipeline), learnt, strict=True):
        numbers = word_ids(tokenizer, config)
        reader = _encoder(pipeline, name)
        rows = max(len(tokenizer), reader.get_input_embeddings().num_embeddings)
        reader.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            reader.get_input_embeddings().weight[numbers] = vectors
        shutil.rmtree(out / name)  # it may have lain in several files
        reader.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name.replace("text_encoder", "tokenizer"))
    (out / "adapter").mkdir()
    named = {config.token: learnt[0]} if len(learnt) == 1 else dict(zip(_NAMES, learnt, strict=True))
    save_file(named, out / "adapter" / FILE)
    return PipelineEncoder(out, CLIP_TOKENS)
