"""Bundles: they load without Darkroom, give our sampler's pictures, and refuse damage by name."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import noise
from training.bundle import Provenance, load_bundle, read_manifest, verify_bundle, write_bundle
from training.canvas import Canvas
from training.conditioning import TextConfig, TextEncoder
from training.errors import CheckpointError
from training.models import UNetConfig
from training.objectives import RectifiedFlow
from training.samplers import Guided, sample

_PROVENANCE = Provenance(
    run_id="0" * 32,
    data_hash="d" * 64,
    recipe={"steps": 3},
    metrics={"kid": 0.5},
    licences={"MIT": 7},
    created_utc="2026-01-01T00:00:00Z",
    step=3,
    code_version="abc",
)
_STRANGER = """
import sys, torch
assert not any("darkroom" in p or p == "" for p in sys.path), sys.path
try:
    import training
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the project is importable here")
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
bundle, folder = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True, local_files_only=True)
start = load_file(folder + "/noise.safetensors")["noise"]
options = dict(num_inference_steps=4, latents=start, output_type="pt")
guided = pipe(["a robot face", "a sad cat"], negative_prompt="blue", guidance_scale=2.5, **options).images
plain = pipe(["a robot face", "a sad cat"], guidance_scale=1, **options).images
save_file({"guided": guided, "plain": plain}, folder + "/images.safetensors")
picture = pipe("a robot face", num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0]
assert picture.size == (16, 16), picture.size
try:
    pipe("face " * 50)
except ValueError as error:
    assert "52 tokens; this model reads at most 12" in str(error), error
else:
    raise SystemExit("a long prompt was cut in silence")
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = TextEncoder.from_config(TextConfig(max_tokens=12))
    config = UNetConfig(resolution=16, widths=(16, 32), attention=(False, True), head_width=16)
    unet = config.build(encoder.shape)
    with torch.no_grad():  # weights that don't depend on the global generator
        for number, parameter in enumerate(unet.parameters()):
            parameter.copy_(noise.normal(0, number, shape=tuple(parameter.shape)) * 0.05)
    unet.to(memory_format=torch.channels_last)
    out = tmp_path_factory.mktemp("bundle") / "tiny"
    return write_bundle(
        out,
        network=unet,
        encoder=encoder,
        objective=RectifiedFlow(time_shift=1.7),
        canvas=Canvas(16),
        provenance=_PROVENANCE,
    )


def test_a_stranger_loads_it_and_gets_our_sampler_s_pictures(bundle: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    start = torch.stack([noise.normal(seed, "test", shape=(3, 16, 16)) for seed in (5, 6)])
    save_file({"noise": start}, tmp_path / "noise.safetensors")
    script = tmp_path / "stranger.py"
    script.write_text(_STRANGER)
    command = [sys.executable, "-I", "-S", "-c", _site_only(), str(script), str(bundle), str(tmp_path)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "images.safetensors")

    loaded = load_bundle(bundle)
    assert (loaded.canvas.shape, loaded.provenance) == ((3, 16, 16), _PROVENANCE)
    assert loaded.objective == RectifiedFlow(time_shift=1.7)
    captions = loaded.encoder.encode(["a robot face", "a sad cat"])
    guided = Guided(loaded.denoiser, loaded.encoder.encode(["blue", "blue"]), torch.full((2,), 2.5))
    for name, denoiser in (("guided", guided), ("plain", loaded.denoiser)):
        ours = loaded.canvas.pictures(sample(denoiser, start, captions, loaded.objective.grid(4))) / 2 + 0.5
        torch.testing.assert_close(theirs[name], ours, rtol=0, atol=2e-5)
        assert ours.std() > 0.05, "the comparison is of pictures, not of constants"


def _site_only() -> str:
    """Run a script with the environment's packages, but without editable installs (their .pth lines are not read)."""
    import torch as anywhere

    site = str(Path(anywhere.__file__).parents[1])
    return f"import runpy, sys; sys.path.append({site!r}); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"


def test_it_holds_safetensors_and_a_checksum_of_every_file(bundle: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert not [name for name in files if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "pipeline.py"} <= files
    manifest = verify_bundle(bundle)
    assert files == {"darkroom.json", *manifest.files}
    assert json.loads((bundle / "tokenizer/tokenizer_config.json").read_text())["model_max_length"] == 12
    assert json.loads((bundle / "model_index.json").read_text())["_class_name"] == ["pipeline", "DarkroomPipeline"]


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"])
def test_damage_is_named(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"has changed.\n.*{name}"):
        load_bundle(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"is missing.\n.*{name}"):
        load_bundle(copy)


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors.index.json", "unet/__pycache__/pipeline.pyc", "more"]
)
def test_what_nobody_listed_is_refused_by_name(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    verify_bundle(copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"nobody vouches for.\n.*{name}"):
        load_bundle(copy)
    (copy / name).unlink()
    (copy / name).symlink_to(bundle / "unet")
    with pytest.raises(CheckpointError, match=rf"nobody vouches for.\n.*{name}"):
        load_bundle(copy)
    (copy / name).unlink()
    (copy / name).mkdir()
    verify_bundle(copy)


def test_a_folder_behind_a_link_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    shutil.rmtree(copy / "unet")
    (copy / "unet").symlink_to(bundle / "unet")
    with pytest.raises(CheckpointError, match=r"nobody vouches for.\n.*copy/unet'"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["model_index.json", "text_encoder/model.safetensors"])
def test_a_manifest_that_leaves_out_what_a_pipeline_needs_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = read_manifest(copy)
    del manifest.files[name]
    (copy / "darkroom.json").write_text(manifest.model_dump_json())
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=r"The bundle is incomplete."):
        load_bundle(copy)


def test_the_loaded_bundle_names_what_it_was_loaded_from(bundle: Path) -> None:
    assert load_bundle(bundle).sha256 == hashlib.sha256((bundle / "darkroom.json").read_bytes()).hexdigest()


def test_a_manifest_cannot_point_outside_or_lie(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle).model_dump(mode="json")
    (tmp_path / "darkroom.json").write_text(json.dumps({**manifest, "files": {"../x": {"bytes": 0, "sha256": ""}}}))
    with pytest.raises(CheckpointError, match=r"outside itself.\n.*'../x'"):
        verify_bundle(tmp_path)
    (tmp_path / "darkroom.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(CheckpointError, match=r"not valid.\n(.*\n)*.*format: Input should be 2"):
        verify_bundle(tmp_path)
    with pytest.raises(CheckpointError, match=r"not a bundle.\n(.*\n)*.*darkroom.json"):
        load_bundle(tmp_path / "nowhere")


def test_writing_replaces_a_bundle_only(bundle: Path, tmp_path: Path) -> None:
    loaded = load_bundle(bundle)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    parts = {
        "network": loaded.module,
        "encoder": loaded.encoder,
        "objective": loaded.objective,
        "canvas": loaded.canvas,
    }
    with pytest.raises(CheckpointError, match="a bundle to replace"):
        write_bundle(tmp_path / "mine", **parts, provenance=_PROVENANCE)
    for step in (1, 2):
        write_bundle(tmp_path / "out", **parts, provenance=_PROVENANCE.model_copy(update={"step": step}))
    assert verify_bundle(tmp_path / "out").provenance.step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"], "nothing half-written stays"
