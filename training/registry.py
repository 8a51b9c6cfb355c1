"""The model registry: publish a bundle, promote it, roll back, find it again.

Bundles are kept as plain artifacts of an MLflow LoggedModel. ``mlflow.pyfunc.log_model`` is not used on purpose: it
pickles a Python model, or stores code to run, and whoever loads the version would have to execute it. A bundle needs
neither: its weights are safetensors, its checksums are in ``darkroom.json``, and ``fetch`` checks them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from training.bundle import MANIFEST, BundleManifest, verify_bundle
from training.errors import CheckpointError, RegistryError
from training.registry_store import (
    BUNDLE_TAG,
    DATA_TAG,
    METRICS_TAG,
    MODEL_TAG,
    OF_TAG,
    RUN_TAG,
    ModelVersion,
    all_models,
    as_version,
    check_name,
    find_model,
    pick,
    registered_model,
    session,
    versions_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

__all__ = ["CHAMPION", "ModelVersion", "fetch", "find", "promote", "publish", "resolve", "rollback", "versions"]

CHAMPION = "champion"


def publish(uri: str, bundle: Path, *, name: str, run_id: str, of: str = "") -> ModelVersion:
    """Store a bundle with its run and register it; a bundle that is already registered stays as it is.

    Args:
        uri: the MLflow server.
        bundle: a bundle directory.
        name: the registered model; made where it is missing.
        run_id: the run that trained it.
        of: names what it was made and measured of, for ``find``.

    Raises:
        CheckpointError: the bundle is incomplete.
        RegistryError: the name is not allowed, or the run does not exist.
        TrackingError: the server cannot be reached.
    """
    check_name(name)
    manifest = verify_bundle(bundle)
    digest = _sha256(bundle / MANIFEST)
    with session(uri) as client:
        model = find_model(client, name) or client.create_registered_model(name)
        for known in versions_of(client, model):
            if known.bundle_sha256 == digest and known.run_id == run_id:
                return known
        return _upload(client, model, bundle, manifest, run_id, digest, of)


def find(uri: str, name: str, of: str) -> ModelVersion | None:
    """The newest version that was published as ``of``; None where there is none.

    Raises:
        RegistryError: the name is not allowed.
        TrackingError: the server cannot be reached.
    """
    check_name(name)
    with session(uri) as client:
        model = find_model(client, name)
        known = versions_of(client, model) if model else []
    return next((version for version in known if version.of == of), None)


def _upload(
    client: MlflowClient,
    model: RegisteredModel,
    bundle: Path,
    manifest: BundleManifest,
    run_id: str,
    digest: str,
    of: str,
) -> ModelVersion:
    """The version is registered last: it never points at half a bundle."""
    from mlflow.entities import LoggedModelOutput, Metric

    run = client.get_run(run_id)
    metrics = manifest.provenance.metrics
    tags = {
        RUN_TAG: run_id,
        DATA_TAG: manifest.provenance.data_hash,
        OF_TAG: of,
        METRICS_TAG: json.dumps(metrics, sort_keys=True),
        BUNDLE_TAG: digest,
    }
    logged = client.create_logged_model(run.info.experiment_id, name=model.name, source_run_id=run_id, tags=tags)
    client.log_model_artifacts(logged.model_id, str(bundle))
    now_ms, step = int(datetime.now(UTC).timestamp() * 1000), manifest.provenance.step
    points = [Metric(key, value, now_ms, step, model_id=logged.model_id) for key, value in metrics.items()]
    client.log_batch(run_id, metrics=points)
    client.log_outputs(run_id, models=[LoggedModelOutput(logged.model_id, step)])
    client.finalize_logged_model(logged.model_id, "READY")
    made = client.create_model_version(
        model.name,
        source=logged.artifact_location,
        run_id=run_id,
        tags={**tags, MODEL_TAG: logged.model_id},  # MLflow's SQL store forgets model_id
        model_id=logged.model_id,
        await_creation_for=0,  # a server with artifacts has it ready at once
    )
    return as_version(made, {})


def versions(uri: str, name: str | None = None) -> list[ModelVersion]:
    """Every version of one model, or of all, newest first within a model.

    Raises:
        RegistryError: there is no such model.
        TrackingError: the server cannot be reached.
    """
    with session(uri) as client:
        models = all_models(client) if name is None else [registered_model(client, name)]
        return [version for model in models for version in versions_of(client, model)]


def promote(uri: str, name: str, version: int, alias: str = CHAMPION) -> ModelVersion:
    """Give a version the alias; who had it before is remembered for ``rollback``.

    Raises:
        RegistryError: there is no such model or version.
        TrackingError: the server cannot be reached.
    """
    with session(uri) as client:
        model = registered_model(client, name)
        pick(client, model, version)
        holder = model.aliases.get(alias)
        if holder is not None and int(holder) != version:
            history = _history(model, alias)
            if history[-1:] != [int(holder)]:  # else an interrupted promotion has written it already
                _remember(client, name, alias, [*history, int(holder)])
        client.set_registered_model_alias(name, alias, str(version))
        return pick(client, registered_model(client, name), version)


def rollback(uri: str, name: str, alias: str = CHAMPION) -> ModelVersion:
    """Give the alias back to the version that had it before.

    Raises:
        RegistryError: there is no such model, or nothing to go back to.
        TrackingError: the server cannot be reached.
    """
    with session(uri) as client:
        model = registered_model(client, name)
        holder = model.aliases.get(alias)
        exist = {version.version for version in versions_of(client, model)}
        history = _history(model, alias)
        while history and (history[-1] not in exist or str(history[-1]) == str(holder)):
            history.pop()
        if holder is None or not history:
            raise RegistryError(
                f"There is nothing to roll {name} back to.",
                value=f"{name}@{alias} -> {holder}",
                rule=f"an earlier {alias}",
                options=[f"darkroom models promote {name} {version}" for version in sorted(exist)],
            )
        previous = history.pop()
        client.set_registered_model_alias(name, alias, str(previous))
        _remember(client, name, alias, history)
        return pick(client, registered_model(client, name), previous)


def resolve(uri: str, reference: str) -> ModelVersion:
    """The version that ``name@alias``, ``name/3`` or ``name`` (its champion, else its newest) means.

    Raises:
        RegistryError: the reference is none of these, or names nothing.
        TrackingError: the server cannot be reached.
    """
    form = re.fullmatch(r"(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>[0-9]{1,9}))?", reference)
    if form is None:
        raise RegistryError(
            "This is no model reference.",
            value=reference,
            rule="a name, with @alias or /version",
            options=["name@champion", "name/3", "name"],
        )
    name, alias = form["name"], form["alias"]
    with session(uri) as client:
        model = registered_model(client, name)
        if form["version"]:
            return pick(client, model, int(form["version"]))
        holder = model.aliases.get(alias or CHAMPION)
        if holder is not None:
            return pick(client, model, int(holder))
        if alias:
            raise RegistryError(
                f"{name} has no alias {alias}.",
                value=reference,
                rule="an alias of this model",
                options=[f"{name}@{known}" for known in sorted(model.aliases)],
                mend=f"darkroom models promote {name} VERSION",
            )
        known = versions_of(client, model)
        if not known:
            raise RegistryError(f"{name} has no versions.", value=reference, rule="a published version")
        return known[0]


def fetch(uri: str, version: ModelVersion, cache: Path) -> Path:
    """The version's bundle as a verified directory under ``cache``; downloaded only when it is not there.

    Raises:
        CheckpointError: what was downloaded is incomplete, or not what was published.
        RegistryError: the version is gone.
        TrackingError: the server cannot be reached.
    """
    check_name(version.name)
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{version.name}-{version.version}-{version.bundle_sha256[:16]}"
    if _is_good(target, version):
        return target
    aside = Path(tempfile.mkdtemp(prefix=".fetch-", dir=cache))
    try:
        with session(uri) as client:
            from mlflow.artifacts import download_artifacts

            source = client.get_model_version_download_uri(version.name, str(version.version))
            (aside / "new").mkdir()
            fresh = Path(download_artifacts(artifact_uri=source, dst_path=str(aside / "new"), tracking_uri=uri))
        _confine(fresh, aside)
        verify_bundle(fresh)
        if _sha256(fresh / MANIFEST) != version.bundle_sha256:
            raise CheckpointError(
                "The downloaded bundle is not the published one.",
                value=f"{version.name}/{version.version}",
                rule=f"{MANIFEST} with sha256 {version.bundle_sha256}",
            )
        if target.exists():
            target.rename(aside / "damaged")
        fresh.rename(target)
    except OSError:
        # another process may have fetched the same version meanwhile
        if not _is_good(target, version):
            raise
    finally:
        shutil.rmtree(aside)
    return target


def _is_good(target: Path, version: ModelVersion) -> bool:
    if not (target / MANIFEST).is_file() or _sha256(target / MANIFEST) != version.bundle_sha256:
        return False
    try:
        verify_bundle(target)
    except CheckpointError:
        return False
    return True


def _confine(folder: Path, limit: Path) -> None:
    """A server must not be able to write or link outside the cache."""
    root = limit.resolve()
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink() or not path.resolve().is_relative_to(root):
            raise CheckpointError("The downloaded bundle leaves its folder.", value=str(path), rule="plain files only")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _history_tag(alias: str) -> str:
    return f"darkroom.history.{alias}"


def _history(model: RegisteredModel, alias: str) -> list[int]:
    """Earlier holders of the alias, the last one last."""
    return [int(version) for version in json.loads(model.tags.get(_history_tag(alias), "[]"))]


def _remember(client: MlflowClient, name: str, alias: str, history: list[int]) -> None:
    client.set_registered_model_tag(name, _history_tag(alias), json.dumps(history[-50:]))
