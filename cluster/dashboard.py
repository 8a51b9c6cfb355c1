"""Ray's dashboard over plain HTTP: seconds faster than importing Ray, and the same on any cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import StackError


@dataclass(frozen=True)
class Dashboard:
    """A Ray head's HTTP API."""

    url: str
    """``http://host:port``."""
    token_path: Path | None = None
    """The file with Ray's token; None takes what RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH say."""

    def get(self, path: str, timeout_s: float = 5) -> Any:
        """The JSON that ``path`` answers with.

        Raises:
            StackError: the address does not answer, or refuses the token.
        """
        import httpx

        try:
            reply = httpx.get(self.url + path, headers=self._headers(), timeout=timeout_s, trust_env=False)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise StackError(
                f"Ray's dashboard does not answer: {error}.",
                value=self.url,
                rule="the HTTP address of a running Ray head, e.g. http://head.example:8265",
                mend="`darkroom status` shows the local stack; leave out --address to use it",
            ) from error
        if reply.status_code in (401, 403):
            raise StackError(
                "The Ray cluster refuses our token.",
                value=self.url,
                rule="RAY_AUTH_TOKEN_PATH names a file with the cluster's token",
                mend="export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/path/to/token",
            )
        if reply.status_code != httpx.codes.OK or "json" not in reply.headers.get("content-type", ""):
            raise StackError(
                f"This is not a Ray dashboard: {path} answered {reply.status_code}.",
                value=self.url,
                rule="the HTTP address of a running Ray head, e.g. http://head.example:8265",
            )
        return reply.json()

    def nodes(self) -> list[dict[str, Any]]:
        """The living nodes, with ``resources_total`` each."""
        found = self.get("/api/v0/nodes?detail=1")["data"]["result"]["result"]
        return [node for node in found if node["state"] == "ALIVE"]

    def answers(self) -> bool:
        """Whether the dashboard is there and lists a living node."""
        try:
            return bool(self.nodes())
        except (StackError, KeyError, TypeError):
            return False

    def resources(self) -> dict[str, dict[str, float]]:
        """Used and total amount of each resource, e.g. ``{"CPU": {"used": 0.9, "total": 2.0}}``."""
        # the autoscaler's report lags by some seconds, and by more after a start
        report = self.get("/api/cluster_status")["data"]["clusterStatus"]["loadMetricsReport"]["usage"]
        found: dict[str, dict[str, float]] = {}
        for node in self.nodes():
            for name, amount in node["resources_total"].items():
                if ":" not in name:
                    used, _ = report.get(_camel_case(name), (0.0, 0.0))
                    found.setdefault(name, {"used": used, "total": 0.0})["total"] += amount
        return dict(sorted(found.items()))

    def serve(self) -> dict[str, Any]:
        """Ray Serve's state: its applications by name and its HTTP options."""
        state: dict[str, Any] = self.get("/api/serve/applications/")
        return state

    def _headers(self) -> dict[str, str]:
        """The token's header, if there is a token.

        Raises:
            StackError: the file with it cannot be read.
        """
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        path = self.token_path or (Path(named) if named else None)
        if self.token_path is None and "RAY_AUTH_TOKEN" in os.environ:
            token = os.environ["RAY_AUTH_TOKEN"]
        elif path is None:
            return {}
        else:
            try:
                token = path.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise StackError(
                    f"The file with Ray's token cannot be read: {error}.",
                    value=str(path),
                    rule="a file that holds the cluster's token and nothing else",
                    mend="`darkroom down`, then `darkroom up`"
                    if self.token_path
                    else "export RAY_AUTH_TOKEN_PATH=/path/to/token, or unset it",
                ) from error
        return {"Authorization": f"Bearer {token}"}


def _camel_case(name: str) -> str:
    """The dashboard's spelling of a resource in its status report."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
