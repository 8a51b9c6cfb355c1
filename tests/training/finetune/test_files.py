"""Of a pipeline, what is read is fetched and copied: no pickle, no code, and weights of one precision."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from training.errors import ConfigError
from training.finetune.encoder import PipelineEncoder
from training.finetune.files import plain, those_read
from training.finetune.hub import pipeline_directory
from training.finetune.layout import Pipeline
from training.finetune.network import load_network
from training.finetune.output import write_pipeline
from training.finetune.tokens import shape_of
from training.objectives import RectifiedFlow


@pytest.mark.parametrize(
    ("there", "read"),
    [
        (["config.json", "model.safetensors", "model.fp16.safetensors"], ["config.json", "model.safetensors"]),
        (["model.fp16.safetensors", "model.bf16.safetensors"], ["model.bf16.safetensors"]),
        (["a.safetensors", "a.non_ema.safetensors", "a.bin", "a.py", "a.ckpt"], ["a.safetensors"]),
        (
            ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors", "m.safetensors.index.fp16.json"],
            ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors", "m.safetensors.index.fp16.json"],
        ),
        (
            ["m-00001-of-00001.safetensors", "m.safetensors.index.json", "m.fp16.safetensors"],
            ["m-00001-of-00001.safetensors", "m.safetensors.index.json"],
        ),
        (["vocab.json", "merges.txt", "spiece.model", "training.log"], ["merges.txt", "spiece.model", "vocab.json"]),
    ],
)
def test_of_a_parts_files_those_are_read(there: list[str], read: list[str]) -> None:
    assert those_read(there) == read


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.fp16.safetensors", "model.safetensors"),
        ("model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("model-00001-of-00002.fp16.safetensors", "model-00001-of-00002.safetensors"),
        ("model.safetensors.index.fp16.json", "model.safetensors.index.json"),
        ("model.safetensors", "model.safetensors"),
        ("tokenizer.json", "tokenizer.json"),
    ],
)
def test_the_plain_name_of_weights_is_the_one_that_is_looked_for_unasked(name: str, expected: str) -> None:
    assert plain(name) == expected


def test_a_bundle_has_shards_of_another_precision_by_plain_names_and_no_pickle(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    import diffusers
    from transformers import T5EncoderModel

    source = Path(shutil.copytree(tiny("flux"), tmp_path / "flux"))
    folder = source / "text_encoder_2"
    model = T5EncoderModel.from_pretrained(folder).half()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, variant="fp16", max_shard_size="4KB")
    assert len(list(folder.glob("model.fp16-*.safetensors"))) > 1
    for name in ("text_encoder_2/pytorch_model.bin", "vae/model.ckpt", "tokenizer/mine.py"):
        (source / name).write_bytes(b"harm")
    pipeline = Pipeline.read(source)
    network = load_network(source, shape_of(pipeline, 16), 4)
    write_pipeline(tmp_path / "out", network, pipeline, RectifiedFlow())
    kinds = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".txt", ".model", ".safetensors", ".jinja", ".md"}
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True, use_safetensors=True)
    before, after = (PipelineEncoder(path, 16).encode(["a cat"]) for path in (source, tmp_path / "out"))
    assert torch.equal(before.tokens, after.tokens)


def test_a_part_with_pickled_weights_alone_is_left_out_of_the_bundle(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    import diffusers

    source = Path(shutil.copytree(tiny("sd"), tmp_path / "sd"))
    (source / "safety_checker").mkdir()
    (source / "safety_checker" / "config.json").write_text("{}")
    (source / "safety_checker" / "pytorch_model.bin").write_bytes(b"harm")
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    pipeline = Pipeline.read(source)
    write_pipeline(tmp_path / "out", load_network(source, shape_of(pipeline, 77), 4), pipeline, RectifiedFlow())
    assert not (tmp_path / "out" / "safety_checker").exists()
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert pipe.safety_checker is None


@pytest.mark.parametrize("revision", ["../../x", "a/../b", "..", "/etc", "a//b"])
def test_a_revision_that_leads_elsewhere_is_refused(revision: str) -> None:
    with pytest.raises(ConfigError, match="an id of the Hugging Face hub"):
        pipeline_directory(f"org/name@{revision}")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny: Callable[[str], Path], tmp_path: Path) -> Iterator[tuple[ThreadingHTTPServer, list[str]]]:
    """What the client asks the hub for, of one repository: SD with more files than are read."""
    files = Path(shutil.copytree(tiny("sd"), tmp_path / "repository"))
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "unet/mine.py"):
        (files / name).write_bytes(b"more")
    (files / "all-in-one.safetensors").write_bytes(b"more")
    (files / "other").mkdir()
    (files / "other" / "config.json").write_text("{}")
    fetched: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/org/name/revision/"):
                return self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
            if path.startswith("/api/models/org/name/tree/"):
                every = [each for each in files.rglob("*") if each.is_file()]
                tree = [
                    {
                        "type": "file",
                        "path": str(each.relative_to(files)),
                        "size": each.stat().st_size,
                        "oid": hashlib.sha256(each.read_bytes()).hexdigest(),
                    }
                    for each in every
                ]
                return self.answer(json.dumps(tree).encode())
            name = path.partition("/resolve/")[2].partition("/")[2]
            if self.command == "GET":
                fetched.append(name)
            return self.answer((files / name).read_bytes())

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            name = hashlib.sha256(body).hexdigest()
            for header, value in (("ETag", f'"{name}"'), ("X-Repo-Commit", COMMIT), ("Content-Length", len(body))):
                self.send_header(header, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server, fetched
        server.shutdown()
        thread.join()


def test_of_a_pipeline_on_the_hub_what_is_read_is_fetched_and_found_again_without_a_network(
    hub: tuple[ThreadingHTTPServer, list[str]], tmp_path: Path
) -> None:
    server, fetched = hub
    code = (
        "import sys; from training.finetune.hub import pipeline_directory\n"
        "from training.finetune.layout import Pipeline\n"
        "print(Pipeline.read(pipeline_directory('org/name')).directory)\n"
    )
    place = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def asked(**how: str) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **place, **how},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return Path(done.stdout.strip())

    endpoint = f"http://127.0.0.1:{server.server_port}"
    found = asked(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert {name.partition("/")[0] for name in fetched} == {
        *("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
    }
    assert not [name for name in fetched if "fp16" in name or not name.endswith((".json", ".txt", ".safetensors"))]
    assert asked(HF_HUB_OFFLINE="1") == found
