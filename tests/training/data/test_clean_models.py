"""The rules that look with a network: unsafe pictures, features, and captions of something else."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from tests.training.data.scenes import encoded, scene
from training.data.clean import CleanConfig, Judgement, Tools, fingerprint, judge
from training.data.clean import unsafe as unsafe_module
from training.data.clean.match import MatchConfig, open_matcher
from training.data.clean.outliers import OutlierConfig
from training.data.clean.unsafe import UnsafeConfig, open_scorer
from training.errors import ConfigError


def judged(config: CleanConfig, caption: str = "a scene") -> Judgement:
    return judge(encoded(scene(200, 150)), {"caption": caption}, config, Tools.of(config))


def test_the_packaged_model_scores_pictures() -> None:
    config = CleanConfig(unsafe=UnsafeConfig(enabled=True))
    kept = judged(config)
    assert kept.finding is None
    assert kept.measures.unsafe is not None
    assert 0 < kept.measures.unsafe < 0.2
    # skin all over is what it was taught: a flat patch of it scores above a drawing
    assert open_scorer()(Image.new("RGB", (256, 256), (224, 172, 140))) > 0.2
    below = CleanConfig(unsafe=UnsafeConfig(enabled=True, threshold=kept.measures.unsafe))
    finding = judged(below).finding
    assert finding is not None
    assert (finding.rule, finding.value, finding.threshold) == ("unsafe", kept.measures.unsafe, kept.measures.unsafe)


def test_only_the_expected_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "open_nsfw.onnx"
    other.write_bytes(b"other weights")
    monkeypatch.setattr(unsafe_module, "_weights", lambda: other)
    with pytest.raises(ConfigError, match="not the expected file"):
        open_scorer()
    other.unlink()
    with pytest.raises(ConfigError, match="no file"):
        open_scorer()
    monkeypatch.undo()
    monkeypatch.setattr(unsafe_module, "_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="not installed"):
        open_scorer()


def test_features_are_those_of_evaluation() -> None:
    from training.evaluate.features import EfficientNetFeatures

    features = judged(CleanConfig(outliers=OutlierConfig(enabled=True))).measures.features
    assert features is not None
    assert (features.dtype, features.shape) == (np.float16, (1280,))
    pixels = torch.from_numpy(np.array(scene(200, 150))).permute(2, 0, 1)[None]
    expected = EfficientNetFeatures()(pixels)[0].numpy()
    assert np.corrcoef(features.astype(np.float32), expected)[0, 1] > 0.98


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, its words spelled in single letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = {word: at for at, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": words["<|startoftext|>"], "eos_token_id": words["<|endoftext|>"]}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, **sizes, **ends).to_dict(),
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **sizes).to_dict(),
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_captions_of_something_else_are_dropped(clip: Path) -> None:
    match = open_matcher(clip)
    picture = scene(200, 150)
    near = match(picture, "a scene")
    assert -1 <= near <= 1
    assert match(picture, "a scene") == near
    assert match(picture, "something else") != near
    assert match(picture, "a scene " * 100) != near  # longer than the model reads
    passing = CleanConfig(match=MatchConfig(clip=clip, min_similarity=near - 0.01))
    kept = judged(passing)
    assert kept.finding is None
    assert kept.measures.caption_match == pytest.approx(near, abs=1e-5)
    finding = judged(CleanConfig(match=MatchConfig(clip=clip, min_similarity=near + 0.01))).finding
    assert finding is not None
    assert finding.rule == "caption_mismatch"
    assert finding.value == pytest.approx(near, abs=1e-5)
    without = judged(CleanConfig(match=MatchConfig(clip=clip, min_similarity=1)), caption="")
    assert without.finding is None
    assert without.measures.caption_match is None


def test_the_fingerprint_follows_the_weights(clip: Path) -> None:
    config = CleanConfig(match=MatchConfig(clip=clip))
    before = fingerprint(config)
    weights = clip / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert fingerprint(config) != before
    finally:
        weights.write_bytes(whole)


def test_what_is_no_clip_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_matcher(tmp_path / "nothing")
    for name in ("config.json", "vocab.json", "merges.txt", "preprocessor_config.json", "tokenizer_config.json"):
        if (clip / name).is_file():
            (tmp_path / name).write_bytes((clip / name).read_bytes())
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_matcher(tmp_path)
    torch.save(load_file(clip / "model.safetensors"), tmp_path / "pytorch_model.bin")  # a pickle: never read
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_matcher(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_matcher(tmp_path)
