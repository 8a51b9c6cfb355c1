"""Which jobs are forgotten: those that ended long ago, and the oldest of those that ended, where there is no room."""

from __future__ import annotations

import logging
import shutil
import time

from serving.idempotency import IdempotencyKeys
from serving.jobs_config import JobsConfig
from serving.jobs_store import JobStore

_LEFT_S = 3600.0
"""Age at which what a killed replica left half made, or half removed, is taken away."""

log = logging.getLogger(__name__)


def collect(store: JobStore, keys: IdempotencyKeys, config: JobsConfig, now_s: float) -> int:
    """Forget what is due; on a thread, in any replica.

    Args:
        store: where the jobs are.
        keys: the idempotency keys that made them.
        config: for how long, and how much, is kept.
        now_s: seconds since 1970.

    Returns:
        Bytes that the jobs take which stay.
    """
    total = 0
    ended = []
    for job_id in list(store.all()):
        state = store.state(job_id)
        size = store.bytes_of(job_id)
        total += size
        if state is not None and state.settled and state.ended_s is not None:
            ended.append((state.ended_s, job_id, size))
    for ended_s, job_id, size in sorted(ended):
        if now_s - ended_s < config.results_kept_s and total <= config.max_bytes:
            break
        record = store.record(job_id)
        if record is not None and record.idempotency is not None:
            keys.forget(record.idempotency)
        store.remove(job_id)
        log.info("%s is forgotten", job_id)
        total -= size
    _sweep_halves(store)
    return total


def _sweep_halves(store: JobStore) -> None:
    for path in [*store.folder.glob(".new-*"), *store.folder.glob(".old-*")]:
        try:
            if time.time() - path.stat().st_mtime > _LEFT_S:
                shutil.rmtree(path)
        except FileNotFoundError:  # another replica took it
            continue
