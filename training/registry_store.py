"""What MLflow's registry holds, read as ``ModelVersion``; ``training.registry`` is the way in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from training.errors import RegistryError
from training.mlflow_server import connect, require_server
from training.provenance import mask_logins

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion
    from mlflow.entities.model_registry import RegisteredModel

RUN_TAG = "darkroom.run_id"
DATA_TAG = "darkroom.data_hash"
OF_TAG = "darkroom.of"
METRICS_TAG = "darkroom.metrics"
MODEL_TAG = "darkroom.model_id"
BUNDLE_TAG = "darkroom.bundle_sha256"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class ModelVersion:
    """One published bundle.

    Attributes:
        name: the registered model.
        version: counts from 1.
        run_id: the MLflow run that trained it.
        aliases: e.g. ``("champion",)``.
        data_hash: the data set's name.
        metrics: the bundle's final metrics.
        created_utc: ISO 8601.
        of: names what it was made and measured of, as ``publish`` was told; empty where it was not.
        bundle_sha256: of the bundle's ``darkroom.json``, which holds the checksums of all its files.
    """

    name: str
    version: int
    run_id: str
    aliases: tuple[str, ...]
    data_hash: str
    metrics: dict[str, float]
    created_utc: str
    bundle_sha256: str = ""
    of: str = ""


@contextmanager
def session(uri: str) -> Iterator[MlflowClient]:
    """A client; what the server refuses inside becomes a RegistryError."""
    require_server(uri)
    client = connect(uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.exceptions import MlflowException

    try:
        yield client
    except MlflowException as error:
        why = mask_logins(str(error).splitlines()[0])
        raise RegistryError("The model registry refused.", value=mask_logins(uri), rule=why) from error


def check_name(name: str) -> None:
    """Refuse a name that a reference, a filter or a folder could misread.

    Raises:
        RegistryError: the name is not allowed.
    """
    if not _NAME.fullmatch(name):
        raise RegistryError(
            "This model name is not allowed.",
            value=name,
            rule="letters, digits, '_', '.', '-'; first a letter or digit; at most 100",
            options=["emoji-faces"],
        )


def all_models(client: MlflowClient) -> list[RegisteredModel]:
    """Every registered model, by name."""
    models: list[RegisteredModel] = []
    token: str | None = None
    while True:
        page = client.search_registered_models(page_token=token)
        models.extend(page)
        token = page.token
        if not token:
            return sorted(models, key=lambda model: str(model.name))


def find_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    """The registered model, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def registered_model(client: MlflowClient, name: str) -> RegisteredModel:
    """The registered model.

    Raises:
        RegistryError: there is no such model; the ones that exist are its options.
    """
    check_name(name)
    model = find_model(client, name)
    if model is None:
        raise RegistryError(
            "There is no such model.",
            value=name,
            rule="a registered model",
            options=[found.name for found in all_models(client)],
            mend="darkroom models list",
        )
    return model


def versions_of(client: MlflowClient, model: RegisteredModel) -> list[ModelVersion]:
    """The model's bundles, newest first; versions that something else registered under this name are left out."""
    found: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name='{model.name}'", page_token=token)
        found.extend(as_version(entry, model.aliases) for entry in page if BUNDLE_TAG in entry.tags)
        token = page.token
        if not token:
            return sorted(found, key=lambda version: -version.version)


def as_version(entry: MlflowVersion, aliases: Mapping[str, str]) -> ModelVersion:
    """MLflow's entry as ours, with the aliases that the model's alias table gives it."""
    made = datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC)
    return ModelVersion(
        name=entry.name,
        version=int(entry.version),
        run_id=entry.tags.get(RUN_TAG, ""),
        # the alias table of the model; a search's own answer may leave aliases out
        aliases=tuple(sorted(alias for alias, held in aliases.items() if int(held) == int(entry.version))),
        data_hash=entry.tags.get(DATA_TAG, ""),
        metrics=json.loads(entry.tags.get(METRICS_TAG, "{}")),
        created_utc=made.strftime("%Y-%m-%dT%H:%M:%SZ"),
        bundle_sha256=entry.tags.get(BUNDLE_TAG, ""),
        of=entry.tags.get(OF_TAG, ""),
    )


def pick(client: MlflowClient, model: RegisteredModel, version: int) -> ModelVersion:
    """One version of a model.

    Raises:
        RegistryError: it does not exist; the ones that do are its options.
    """
    known = versions_of(client, model)
    for found in known:
        if found.version == version:
            return found
    raise RegistryError(
        f"{model.name} has no version {version}.",
        value=f"{model.name}/{version}",
        rule="a published version",
        options=[f"{model.name}/{found.version}" for found in known],
    )
