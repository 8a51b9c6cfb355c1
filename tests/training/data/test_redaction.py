"""Signed URLs: what signs them gets into no data set, ledger or message; the rest stays as it is."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.commands.data.report import report
from tests.training.data.ledgers import read_ledger
from tests.training.data.servers import strangers
from training.data.build import build
from training.data.config import BuildConfig
from training.data.download_config import DownloadConfig
from training.data.redaction import without_secrets
from training.data.sources.config import SourceConfig

Encode = Callable[..., bytes]
SECRETS = {
    "X-Amz-Signature": "5e0ea",
    "X-Amz-Credential": "AKIA%2F20260101",
    "X-Goog-Signature": "5e0eb",
    "AWSAccessKeyId": "AKIB",
    "Signature": "5e0ec%3D",
    "sig": "5e0ed",
    "access_token": "5e0ee",
    "Key-Pair-Id": "5e0ef",
    "apiKey": "5e0f0",
    "hdnea": "exp=1~hmac=5e0f1",
}


@pytest.mark.parametrize("name", SECRETS)
def test_what_signs_a_url_is_hidden_and_the_rest_stays(name: str) -> None:
    url = f"https://host.example/a.png?width=64&{name}={SECRETS[name]}&monkey=1#top"
    expected = f"https://host.example/a.png?width=64&{name}=***&monkey=1#top"
    assert without_secrets(url) == expected
    fields = {"url": url, "more": [f"see {url}", "key=value"], "caption": "\u00e9 \u201cx\u201d"}
    told = {"url": expected, "more": [f"see {expected}", "key=value"], "caption": "\u00e9 \u201cx\u201d"}
    assert json.loads(without_secrets(json.dumps(fields))) == told


def test_names_and_passwords_are_hidden() -> None:
    assert without_secrets("ftp://me:pass@host/a@b.png, me@host") == "ftp://***@host/a@b.png, me@host"


@given(st.lists(st.text() | st.text().map("http://a/?sig=1".__add__)))
def test_json_stays_json(texts: list[str]) -> None:
    found = json.loads(without_secrets(json.dumps(texts)))
    assert len(found) == len(texts)
    for text, told in zip(texts, found, strict=True):
        assert told == text if "://" not in text else "sig=1" not in told


def test_a_signed_list_leaves_no_signature_in_the_data_set(encode: Encode, tmp_path: Path) -> None:
    with strangers(encode(1)) as server:
        query = "&".join(f"{name}={value}" for name, value in SECRETS.items())
        lines = [
            {"url": server.url(f"/a.png?{query}"), "caption": f"from {server.url(f'/b?{query}')}"},
            {"url": server.url(f"/html?{query}")},
            {"url": server.url(f"/redirect?{query}&to=http://127.0.0.2:99999/?{query}")},
            {"file_name": f"ftp://me:5e0fe@host/{query}"},
            {"file_name": "lost.png", "thumbnail": f"http://host/?{query}"},
        ]
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = BuildConfig(
            held_out=0.0, source=SourceConfig(download=DownloadConfig(allow_networks=("127.0.0.2",), retries=0))
        )
        manifest = build(tmp_path / "list.jsonl", tmp_path / "out", config)
    assert (manifest.kept, manifest.inputs) == (1, 5)
    report(str(tmp_path / "out"), out=None, field=None, as_json=False)
    rows = list(read_ledger(tmp_path / "out"))
    assert rows[0].url.startswith(f"{server.url('/a.png')}?X-Amz-Signature=***&")
    assert rows[0].domain == "127.0.0.2"
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as shard:
        kept = [member.read() for name in shard.getnames() if (member := shard.extractfile(name)) is not None]
    told = repr(rows).encode() + b"".join(kept) + (tmp_path / "out" / "report.html").read_bytes()
    for secret in ("5e0e", "5e0f", "AKIA", "AKIB"):
        assert secret.encode() not in told
