import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.data.build import build
from training.data.config import BuildConfig

Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def encode() -> Encode:
    """A real picture, different for every number."""

    def encoded(number: int = 0, size: tuple[int, int] = (24, 24), kind: str = "PNG", mode: str = "RGB") -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        return buffer.getvalue()

    return encoded


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """A folder of 40 good pictures with sidecars of both kinds."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        kind, ending = [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")][number % 3]
        (folder / f"p{number:02d}.{ending}").write_bytes(encode(number, kind=kind))
        if number % 2:
            (folder / f"p{number:02d}.txt").write_text(f" number \n {number} ")
        else:
            facts = {"caption": f"number {number}", "licence": "MIT", "n": number}
            (folder / f"p{number:02d}.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The data set of ``pictures``; tests that change it must copy it."""
    out = tmp_path_factory.mktemp("sets") / "numbers"
    build(pictures, out, BuildConfig(held_out=0.2))
    return out


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """Write members (name, bytes) or ready-made headers into a tar."""

    def write(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                header = tarfile.TarInfo(name) if isinstance(name, str) else name
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        return path

    return write


BUCKET = "pictures"
"""The S3 server's one bucket: it takes many files' room for each."""


class S3Server:
    """A real S3 server in a process of its own, with keys ``good``/``good-secret`` and ``reader``/``reader-secret``.

    Attributes:
        environment: what reaches it with the good key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = _free_ports(8)
        self.endpoint = f"http://127.0.0.1:{ports[6]}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "good",
            "AWS_SECRET_ACCESS_KEY": "good-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        identities = [
            {"name": name, "credentials": [{"accessKey": name, "secretKey": f"{name}-secret"}], "actions": actions}
            for name, actions in (("good", ["Admin", "Read", "Write", "List"]), ("reader", ["Read", "List"]))
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (folder / "data").mkdir()
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        options = dict(zip((*names, "s3.port", "s3.port.grpc"), ports, strict=True))
        self._command = [
            *(str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}/data", "-ip=127.0.0.1"),
            *("-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={folder}/s3.json", "-s3.autoCreateBucket=false"),
            *(
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-s3.localSocket={folder}/s3",
                f"-filer.localSocket={folder}/f",
            ),
            *("-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=20", "-s3.iam=false"),
            *(f"-{name}={port}" for name, port in options.items()),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, on what it stored before, and wait until a real put and get succeed."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self.folder)
        deadline_s = time.monotonic() + 120
        while True:
            try:
                self.client().create_bucket(Bucket=BUCKET)
            except Exception as error:  # it has no name for "already yours" before it answers at all
                if "BucketAlready" not in str(error) and not self._alive(deadline_s):
                    raise
            try:
                self.client().put_object(Bucket=BUCKET, Key="probe", Body=b"there")
                if self.client().get_object(Bucket=BUCKET, Key="probe")["Body"].read() == b"there":
                    return
            except Exception:
                if not self._alive(deadline_s):
                    raise
            time.sleep(0.1)

    def _alive(self, deadline_s: float) -> bool:
        running = self._process is not None and self._process.poll() is None
        return running and time.monotonic() < deadline_s

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def client(self) -> Any:
        """botocore's own client, for what happens behind our back."""
        import botocore.config
        import botocore.session

        config = botocore.config.Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1})
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="good",
            aws_secret_access_key="good-secret",
            region_name="us-east-1",
            config=config,
        )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The session's S3 server; a test that kills it starts it again."""
    folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))  # short, because sockets lie in it
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty folder of a bucket, with the environment that reaches it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text encoder with random weights and the packaged encoder's tokenizer, in transformers' layout."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from training.conditioning import PACKAGED_ENCODER, encoder_directory

    folder = tmp_path_factory.mktemp("text") / "encoder"
    tokenizer = AutoTokenizer.from_pretrained(encoder_directory(PACKAGED_ENCODER), local_files_only=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder
