"""The registry against a real MLflow server: publish, promote, roll back, resolve, fetch."""

import json
import uuid
from pathlib import Path

import pytest

from training.bundle import Provenance, verify_bundle, write_bundle
from training.canvas import Canvas
from training.conditioning import TextConfig, TextEncoder
from training.errors import CheckpointError, RegistryError, TrackingError
from training.models import UNetConfig
from training.objectives import RectifiedFlow
from training.registry import ModelVersion, fetch, promote, publish, resolve, rollback, versions
from training.tracking import connect


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two real bundles."""
    encoder = TextEncoder.from_config(TextConfig(max_tokens=8))
    unet = UNetConfig(resolution=8, widths=(8, 16), attention=(False, True), head_width=8).build(encoder.shape)
    made = []
    for number in (1, 2):
        provenance = Provenance(
            run_id="r",
            data_hash="ab" * 32,
            recipe={},
            metrics={"held_out_loss": 0.5 / number, "kid_held_out": 0.1},
            created_utc="2026-01-01T00:00:00Z",
            step=number,
            code_version="c",
        )
        out = tmp_path_factory.mktemp("bundles") / "bundle"
        made.append(
            write_bundle(
                out,
                network=unet,
                encoder=encoder,
                objective=RectifiedFlow(),
                canvas=Canvas(8),
                provenance=provenance,
            )
        )
    return made


@pytest.fixture(scope="module")
def published(mlflow_uri: str, bundles: list[Path]) -> list[ModelVersion]:
    """A model of this test run's own with two versions."""
    client = connect(mlflow_uri)
    name = f"faces-{uuid.uuid4().hex[:8]}"
    run_id = client.create_run(client.create_experiment(name)).info.run_id
    made = [publish(mlflow_uri, bundle, name=name, run_id=run_id) for bundle in bundles]
    again = publish(mlflow_uri, bundles[0], name=name, run_id=run_id)
    assert again == made[0], "publishing again changes nothing"
    return made


def test_versions_carry_run_data_and_metrics(mlflow_uri: str, published: list[ModelVersion]) -> None:
    name = published[0].name
    listed = versions(mlflow_uri, name)
    assert [version.version for version in listed] == [2, 1]
    assert listed[0].data_hash == "ab" * 32
    assert listed[0].metrics == {"held_out_loss": 0.25, "kid_held_out": 0.1}
    assert listed[0].created_utc.endswith("Z")
    everything = versions(mlflow_uri)
    assert all(version in everything for version in listed)
    client = connect(mlflow_uri)
    logged = client.get_logged_model(client.get_model_version(name, "2").tags["darkroom.model_id"])
    assert logged.status == "READY"
    assert logged.source_run_id == listed[0].run_id
    outputs = client.get_run(listed[0].run_id).outputs.model_outputs
    assert (logged.model_id, 2) in [(output.model_id, output.step) for output in outputs], "the run's page shows it"


def test_promote_and_roll_back(mlflow_uri: str, published: list[ModelVersion]) -> None:
    name = published[0].name
    assert resolve(mlflow_uri, name).version == 2, "the newest, while there is no champion"
    with pytest.raises(RegistryError, match=r"no alias champion(.*\n)*.*darkroom models promote"):
        resolve(mlflow_uri, f"{name}@champion")
    assert promote(mlflow_uri, name, 1).aliases == ("champion",)
    with pytest.raises(RegistryError, match="nothing to roll"):
        rollback(mlflow_uri, name)
    promote(mlflow_uri, name, 2)
    promote(mlflow_uri, name, 2)
    assert resolve(mlflow_uri, f"{name}@champion").version == 2
    back = rollback(mlflow_uri, name)
    assert (back.version, back.aliases) == (1, ("champion",))
    assert resolve(mlflow_uri, name).version == 1
    with pytest.raises(RegistryError, match="nothing to roll"):
        rollback(mlflow_uri, name)
    promote(mlflow_uri, name, 2, alias="canary")
    assert resolve(mlflow_uri, f"{name}@canary").version == 2
    assert resolve(mlflow_uri, f"{name}@champion").version == 1


def test_fetch_is_verified_confined_and_cached(
    mlflow_uri: str, published: list[ModelVersion], bundles: list[Path], tmp_path: Path
) -> None:
    bundle = fetch(mlflow_uri, published[1], tmp_path)
    assert verify_bundle(bundle).provenance.step == 2
    assert {p.relative_to(bundle) for p in bundle.rglob("*")} == {
        p.relative_to(bundles[1]) for p in bundles[1].rglob("*")
    }
    inode = (bundle / "darkroom.json").stat().st_ino
    assert fetch("http://127.0.0.1:9", published[1], tmp_path) == bundle, "no server is needed for what is here"
    assert (bundle / "darkroom.json").stat().st_ino == inode
    (bundle / "unet/config.json").write_text("{}")
    again = fetch(mlflow_uri, published[1], tmp_path)
    assert verify_bundle(again)
    assert [path.name for path in tmp_path.iterdir()] == [again.name], "nothing half-downloaded stays"


def test_a_bundle_that_changed_on_the_server_is_refused(
    mlflow_uri: str, published: list[ModelVersion], tmp_path: Path
) -> None:
    client = connect(mlflow_uri)
    entry = client.get_model_version(published[0].name, "1")
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "pipeline.py").write_text("import os")
    client.log_model_artifacts(entry.tags["darkroom.model_id"], str(evil))
    with pytest.raises(CheckpointError, match=r"has changed.\n.*pipeline.py"):
        fetch(mlflow_uri, published[0], tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_missing_is_named_with_what_exists(
    mlflow_uri: str, published: list[ModelVersion], bundles: list[Path], tmp_path: Path
) -> None:
    name = published[0].name
    with pytest.raises(RegistryError, match=rf"no such model.\n(.*\n)*.*options: .*{name}"):
        resolve(mlflow_uri, "nobody@champion")
    with pytest.raises(RegistryError, match=rf"no version 9.\n(.*\n)*.*options: {name}/2, {name}/1"):
        promote(mlflow_uri, name, 9)
    with pytest.raises(RegistryError, match=r"no model reference.\n(.*\n)*.*name@champion, name/3, name"):
        resolve(mlflow_uri, "a/b/c")
    with pytest.raises(RegistryError, match="name is not allowed"):
        publish(mlflow_uri, bundles[0], name="../up", run_id="r")
    with pytest.raises(RegistryError, match=r"refused.\n(.*\n)*.*rule: "):
        publish(mlflow_uri, bundles[0], name=name, run_id="f" * 32)
    with pytest.raises(TrackingError, match="cannot be reached"):
        versions("http://127.0.0.1:9")
    (tmp_path / "darkroom.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="not valid"):
        publish(mlflow_uri, tmp_path, name=name, run_id="r")
