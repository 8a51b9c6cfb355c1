"""The states of a few captions that belong to no sample: the empty one and the contact sheet's."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

from training.conditioning import Conditioning, caption_encoder, encoder_key
from training.conditioning_config import CaptionsConfig
from training.data.captions import canonical
from training.data.storage import Folder

_log = logging.getLogger(__name__)


def embed_once(folder: Folder, config: CaptionsConfig, captions: Sequence[str]) -> Conditioning:
    """States of ``captions``, one row each, from the cache or computed now and kept.

    Two processes may compute the same file at once: both write the same bytes, and a rename decides.

    Args:
        folder: holds them.
        config: the encoder.
        captions: few; all are held in memory.

    Raises:
        ConfigError: the encoder is not there.
        StorageError: storage answers with errors.
    """
    from safetensors.torch import save

    name = embeddings_name(config, captions)
    states = _kept(folder, name)
    if states is None:
        states = caption_encoder(config).encode(captions)
        kept = {"tokens": states.tokens, "mask": states.mask}
        folder.write(name, save(kept if states.pooled is None else {**kept, "pooled": states.pooled}))
    return states


def _kept(folder: Folder, name: str) -> Conditioning | None:
    """What is in a file; None where there is none, or a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        loaded = load(folder.read(name))
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        _log.warning("%s is made again, for it is damaged: %s", folder.url(name), error)
        return None
    return Conditioning(loaded["tokens"], loaded["mask"], loaded.get("pooled"))


def embeddings_name(config: CaptionsConfig, captions: Sequence[str]) -> str:
    """The file of these captions' states; the name holds the encoder's hash and the captions'."""
    digest = hashlib.sha256(canonical(encoder_key(config)))
    for caption in captions:
        digest.update(b"\x00" + caption.encode())
    return f"prompts-{digest.hexdigest()[:32]}.safetensors"
