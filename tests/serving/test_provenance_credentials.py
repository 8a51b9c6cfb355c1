"""Signing: the pair, its errors, and a key that nobody sees."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from PIL import Image

from serving.images import encode_image
from serving.provenance_certificate import make_trial_pair
from serving.provenance_config import CredentialsConfig, ProvenanceConfig
from serving.provenance_credentials import Signer, read_anchors, read_credentials
from training.errors import ConfigError, UsageError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_trial_pair(tmp_path_factory.mktemp("trial"))


def config(certificate: Path, key: Path, **more: str) -> CredentialsConfig:
    return CredentialsConfig.model_validate({"certificate": str(certificate), "key": str(key), **more})


def test_a_trial_pair_is_made_once_and_its_key_is_its_owners(tmp_path: Path) -> None:
    certificate, key, anchor = make_trial_pair(tmp_path / "new" / "folder")
    assert key.stat().st_mode & 0o077 == 0
    assert certificate.read_bytes().count(b"BEGIN CERTIFICATE") == 2
    assert anchor.read_bytes() in certificate.read_bytes()
    before = key.read_bytes()
    with pytest.raises(UsageError) as caught:
        make_trial_pair(tmp_path / "new" / "folder")
    assert "rule:    a folder without certificate.pem, key.pem, anchor.pem" in str(caught.value)
    assert key.read_bytes() == before


def test_only_an_anchor_makes_a_signer_trusted(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file = encode_image(Image.new("RGB", (64, 64), (9, 8, 7)), "png")
    signed = Signer(config(pair[0], pair[1])).sign(file, "png", None)
    assert Image.open(io.BytesIO(signed)).getpixel((3, 3)) == (9, 8, 7)
    anchors = read_anchors(ProvenanceConfig(trust_anchors=str(pair[2])))
    assert read_credentials(signed, "PNG", anchors).state == "trusted"
    assert read_credentials(signed, "PNG").state == "valid"
    other = make_trial_pair(tmp_path)[2].read_text()
    assert read_credentials(signed, "PNG", other).state == "valid"
    assert read_credentials(file, "PNG", anchors).state == "absent"
    assert read_credentials(b"GIF89a", "GIF").state in {"absent", "invalid"}


def test_a_key_that_does_not_fit_is_refused_by_its_path_alone(
    pair: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    other = make_trial_pair(tmp_path)
    no_key = tmp_path / "text.pem"
    no_key.write_text("no key")
    cases = {
        "the private key of": config(pair[0], other[1]),
        "No such file": config(pair[0], tmp_path / "nowhere.pem"),
        "an unencrypted private key": config(pair[0], no_key),
        "a key that signs by ed25519": config(pair[0], pair[1], algorithm="ed25519"),
    }
    for rule, wrong in cases.items():
        with pytest.raises(ConfigError) as caught:
            Signer(wrong)
        assert rule in str(caught.value)
        assert "mend:    darkroom credentials" in str(caught.value)
        for secret in (pair[1], other[1]):
            assert secret.read_text().splitlines()[1] not in str(caught.value) + caplog.text
    with pytest.raises(ConfigError, match="trust anchor cannot be used"):
        read_anchors(ProvenanceConfig(trust_anchors=str(tmp_path / "nowhere.pem")))
