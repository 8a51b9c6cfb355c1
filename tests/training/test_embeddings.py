"""Caption states: computed once, the same as computed now, and a prompt that does not fit is refused in words."""

import shutil
from pathlib import Path

import pytest
import torch

from training.conditioning import TextConfig, TextEncoder, encoder_directory
from training.data.storage import Folder
from training.directory_hash import directory_hash
from training.embeddings import embed_once, embeddings_name
from training.errors import ConfigError, UsageError

CONFIG = TextConfig(max_tokens=12)
CAPTIONS = ["", "a robot face", "a sad cat", "a robot face", "naïve 猫"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_config(CONFIG)


def test_kept_states_are_those_computed_now(tmp_path: Path, encoder: TextEncoder) -> None:
    fresh = embed_once(Folder.at(tmp_path), CONFIG, CAPTIONS)
    kept = embed_once(Folder.at(tmp_path), CONFIG, CAPTIONS)
    now = encoder.encode(CAPTIONS)
    for found in (fresh, kept):
        assert torch.equal(found.tokens, now.tokens)
        assert torch.equal(found.mask, now.mask)
    assert now.tokens.shape == (5, 12, encoder.width)
    assert now.tokens.dtype == torch.float32
    assert now.mask.dtype == torch.bool
    assert torch.equal(now.tokens[1], now.tokens[3]), "equal captions, equal states"
    assert not torch.equal(now.tokens[1], now.tokens[2])


def test_states_are_computed_once(tmp_path: Path) -> None:
    embed_once(Folder.at(tmp_path), CONFIG, CAPTIONS)
    path = tmp_path / embeddings_name(CONFIG, CAPTIONS)
    before = path.stat()
    embed_once(Folder.at(tmp_path), CONFIG, CAPTIONS)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "the file was not written again"
    assert list(tmp_path.iterdir()) == [path], "and nothing half-written is left"


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_damaged_file_is_made_again(tmp_path: Path, left: int) -> None:
    before = embed_once(Folder.at(tmp_path), CONFIG, CAPTIONS)
    path = tmp_path / embeddings_name(CONFIG, CAPTIONS)
    content = path.read_bytes()
    path.write_bytes(content[:left])
    assert torch.equal(embed_once(Folder.at(tmp_path), CONFIG, CAPTIONS).tokens, before.tokens)
    assert path.read_bytes() == content


def test_other_captions_orders_and_encoders_have_other_files() -> None:
    lists = [CAPTIONS, CAPTIONS[:-1], CAPTIONS[::-1], ["a", "b"], ["ab"], ["a b"], ["a", "b", ""], []]
    names = [embeddings_name(CONFIG, captions) for captions in lists]
    assert len(set(names)) == len(lists)
    assert embeddings_name(TextConfig(max_tokens=13), CAPTIONS) != names[0]
    assert embeddings_name(CONFIG, list(CAPTIONS)) == names[0]


def test_the_packaged_encoder_is_itself_wherever_it_lies(tmp_path: Path) -> None:
    directory = encoder_directory(CONFIG.encoder)
    assert encoder_directory(str(directory)) == directory
    shutil.copytree(directory, tmp_path / "copy")
    assert directory_hash(tmp_path / "copy") == directory_hash(directory)
    (tmp_path / "copy" / "LICENSE").write_text("another text")
    (tmp_path / "same").mkdir()
    shutil.copytree(tmp_path / "copy", tmp_path / "same", dirs_exist_ok=True)
    assert directory_hash(tmp_path / "same") == directory_hash(directory), "what is not computed with does not count"
    config = tmp_path / "same" / "config.json"
    shutil.copytree(tmp_path / "same", tmp_path / "edited")
    (tmp_path / "edited" / config.name).write_text(config.read_text() + " ")
    assert directory_hash(tmp_path / "edited") != directory_hash(directory)


def test_a_captions_states_do_not_depend_on_its_neighbours(encoder: TextEncoder) -> None:
    captions = [f"number {number} " + "very " * (number % 5) + "blue" for number in range(9)]
    together = encoder.encode(captions, batch=4)
    for row, caption in enumerate(captions):
        alone = encoder.encode([caption])
        assert torch.allclose(alone.tokens[0], together.tokens[row], atol=1e-5)
        assert torch.equal(alone.mask[0], together.mask[row])


def test_padding_is_masked_and_zero(encoder: TextEncoder) -> None:
    states = encoder.encode(["", "a cat"])
    assert states.mask.sum(1).tolist() == [encoder.count_tokens(""), encoder.count_tokens("a cat")] == [2, 4]
    assert float(states.tokens[~states.mask].abs().max()) == 0


def test_a_prompt_that_would_be_cut_is_refused_in_words(encoder: TextEncoder) -> None:
    fits = " ".join(["cat"] * 10)
    encoder.check(fits)
    encoder.check("")
    with pytest.raises(UsageError) as caught:
        encoder.check(fits + " cat")
    text = str(caught.value)
    assert "The prompt has 13 tokens; this model reads at most 12." in text
    assert f"value:   '{fits} cat'" in text
    assert "mend:    shorten the prompt" in text
    with pytest.raises(UsageError) as caught:
        encoder.check("cat " * 5000)
    assert len(str(caught.value)) < 400, "a screen is not flooded by what was sent"


def test_an_encoder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        embed_once(Folder.at(tmp_path), TextConfig(encoder=str(tmp_path / "none")), ["a"])
    text = str(caught.value)
    assert "The text encoder cannot be found." in text
    assert "packaged:all-minilm-l6-v2" in text
    assert list(tmp_path.iterdir()) == []
