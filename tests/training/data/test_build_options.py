"""A build's options from a file, flags and words: the later one wins, and what is wrong is named."""

from pathlib import Path

import pytest

from training.data.build_options import build_config
from training.errors import ConfigError


def test_the_later_one_wins(tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text("held_out: 0.2\nclean:\n  size: {min_side_px: 64, max_pixels: 1000000}\nstore: {kind: jpeg}\n")
    config = build_config(
        file, {"held_out": 0.3, "clean.size.min_side_px": 32}, ["clean.size.min_side_px=8", "shard_mb=5"]
    )
    assert (config.held_out, config.shard_mb, config.store.kind) == (0.3, 5, "jpeg")
    assert (config.clean.size.min_side_px, config.clean.size.max_pixels) == (8, 1_000_000)
    assert build_config(None, {}, ["store.kind=jpeg", "store.quality=80"]).store.quality == 80  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("clean.blur=1", "options: captions, consent"),
        ("clean.size.min_side_px=0", "clean.size.min_side_px is not valid"),
        ("held_out", "section.key=value"),
        ("store.kind=webp", "store is not valid"),
        ("colour=red", "options: background, clean, held_out, shard_mb, source, store"),
    ],
)
def test_what_is_wrong_is_named(word: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_config(None, {}, [word])
    assert text in str(refused.value)


def test_a_file_that_is_no_config_is_named(tmp_path: Path) -> None:
    for content, text in (("[1]", "not a mapping"), ("{", "not YAML")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ConfigError, match=text):
            build_config(tmp_path / "bad.yaml", {}, [])
    with pytest.raises(ConfigError, match="cannot be read"):
        build_config(tmp_path / "none.yaml", {}, [])
