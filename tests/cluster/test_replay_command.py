"""``darkroom replay`` as a user calls it: a real bundle, a real endpoint, real files."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.app import create_app
from serving.config import BatchConfig, LimitConfig, ServeConfig
from serving.engine import Engine
from serving.errors import ServeError
from serving.model import load_model, pinned
from tests.serving.live_server import serving
from training import noise
from training.bundle import Provenance, write_bundle
from training.canvas import Canvas
from training.conditioning import ClassEncoder
from training.errors import UsageError
from training.models import UNetConfig
from training.objectives import RectifiedFlow

LIMITS = LimitConfig(default_steps=3)


def written(out: Path, seed: int) -> Path:
    """A bundle that knows two classes; another seed gives other weights."""
    encoder = ClassEncoder(["cat", "dog"])
    config = UNetConfig(resolution=8, widths=(8, 16), attention=(False, True), head_width=8, norm_groups=4)
    network = config.build(encoder.shape)
    for number, parameter in enumerate(network.parameters()):
        parameter.data.copy_(noise.normal(seed, number, shape=tuple(parameter.shape)) * 0.15)
    provenance = Provenance(
        run_id="run", data_hash="data", recipe={}, created_utc="2026-01-01T00:00:00Z", step=1, code_version="test"
    )
    return write_bundle(
        out, network=network, encoder=encoder, objective=RectifiedFlow(), canvas=Canvas(8), provenance=provenance
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("bundles") / "tiny", 1)


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    config = pinned(ServeConfig(model=str(bundle), batch=BatchConfig(padded_rows=2, max_batch_rows=4)))
    model = load_model(config)
    engine = Engine(
        model.denoiser, model.encoder, canvas=model.canvas, config=config.batch, grid=model.grid, device=model.device
    )
    with serving(create_app(engine, model.card, LIMITS)) as port:
        yield f"http://127.0.0.1:{port}"


def made(url: str, route: str = "generations", files: dict[str, bytes] | None = None, **fields: Any) -> bytes:
    body = {"prompt": "cat", "seed": 7, "num_inference_steps": 3, "guidance_scale": 2, **fields}
    sent: dict[str, Any] = {"data": {key: str(value) for key, value in body.items()}, "files": files}
    answer = httpx.post(f"{url}/v1/images/{route}", **(sent if files else {"json": body}), timeout=60)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def darkroom(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", "replay", *(str(part) for part in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def given() -> Image.Image:
    level = np.tile(np.linspace(0, 255, 8, dtype=np.uint8), (8, 1))
    return Image.fromarray(np.stack([level, level.T, level // 2], -1))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_an_endpoint_makes_the_picture_again(url: str, tmp_path: Path) -> None:
    picture = tmp_path / "cat.webp"
    picture.write_bytes(made(url, output_format="webp", output_compression=60, sampler="heun", negative_prompt="dog"))
    done = darkroom(picture, "--url", url)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "cat-again.webp"
    assert done.stdout == f"{again}  bit-equal\n"
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(picture)))


def test_a_bundle_makes_the_picture_again_and_what_was_changed_is_measured(
    url: str, bundle: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "cat.png"
    picture.write_bytes(made(url))
    done = darkroom(picture, "--bundle", bundle, "--check", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["bit_equal"], found["psnr_db"], found["path"], found["seed"]) == (True, None, None, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png"], "nothing is written"
    header = Image.open(picture)
    changed = header.convert("RGB")
    changed.putpixel((2, 3), tuple(255 - level for level in changed.getpixel((2, 3))))  # type: ignore[misc,union-attr]
    from serving.images import encode_image, read_words

    picture.write_bytes(encode_image(changed, "png", read_words(header)))
    done = darkroom(picture, "--url", url, "--check")
    assert done.returncode == 1
    assert "differs in 1 of 64 pixels, by at most " in done.stdout


def test_edits_are_made_again_from_the_files_that_were_sent(url: str, bundle: Path) -> None:
    from serving.replay import compare, read_parameters, read_start, replay_here, replay_there

    hole = given()
    hole.putalpha(Image.fromarray(np.where(np.arange(64).reshape(8, 8) % 8 < 4, 255, 0).astype(np.uint8)))
    painted = Image.fromarray(np.where(np.arange(64).reshape(8, 8) % 8 < 4, 0, 255).astype(np.uint8))
    files = {"image": png(given()), "mask": png(hole)}
    picture = made(url, "edits", files, strength=0.8)
    parameters = read_parameters(picture)
    for mask in (png(hole), png(painted)):
        start = read_start(parameters, files["image"], mask)
        assert start is not None
        assert compare(picture, replay_there(url, parameters, start, timeout_s=60)).bit_equal
        assert compare(picture, replay_here(bundle, parameters, start)).bit_equal
    for arguments, words in [
        ((None, None), ("which is not in it", "--image PICTURE and --mask MASK")),
        ((png(given().rotate(90)), png(hole)), ("another picture", "--image with the file")),
        ((files["image"], None), ("another mask", "no transparent part")),
        ((files["image"], png(hole.rotate(90))), ("another mask", "--mask with the file")),
    ]:
        with pytest.raises(UsageError) as caught:
            read_start(parameters, *arguments)
        assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(UsageError, match="made from noise"):
        read_start(read_parameters(made(url)), files["image"], None)


def test_other_numbers_of_rows_are_named_where_the_bits_differ(url: str, bundle: Path) -> None:
    from serving.replay import compare, read_parameters, replay_here

    picture = made(url)
    parameters = read_parameters(picture)
    execution = parameters.execution.model_copy(update={"padded_rows": 3})
    other = replay_here(bundle, parameters.model_copy(update={"execution": execution}), None)
    assert compare(picture, other).causes == ("padded rows: 2 then, 3 now",)


def test_pictures_that_cannot_be_made_again_say_why(url: str, tmp_path: Path) -> None:
    from serving.replay import read_parameters, replay_here, replay_there

    for file, words in [
        (b"no picture", ("no picture that can be read", "a PNG, JPEG")),
        (png(given()), ("does not say how it was made", "other programs drop its words")),
    ]:
        with pytest.raises(UsageError) as caught:
            read_parameters(file)
        assert all(word in str(caught.value) for word in words), caught.value
    parameters = read_parameters(made(url))
    stranger = parameters.model_copy(update={"bundle_sha256": "c" * 64})
    with pytest.raises(UsageError) as caught:
        replay_there(url, stranger, None, timeout_s=60)
    assert "The picture was made by another model." in str(caught.value)
    assert f"rule:    {parameters.model}, bundle_sha256 {'c' * 64}" in str(caught.value)
    with pytest.raises(UsageError, match="another model"):
        replay_here(written(tmp_path / "other", 2), parameters, None)
    with pytest.raises(UsageError, match="made with an adapter"):
        replay_here(tmp_path, parameters.model_copy(update={"adapter": "sketch"}), None)
    with pytest.raises(ServeError, match="No endpoint of Darkroom answers there"):
        replay_there("http://127.0.0.1:9", parameters, None, timeout_s=5)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    done = darkroom(tmp_path / "nowhere.png")
    assert done.returncode == 2
    assert "The picture cannot be read." in done.stderr
    assert "No such file" in done.stderr
