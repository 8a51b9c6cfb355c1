"""Jobs in a folder that replicas share: any of them answers, and what a dead one left is made by another."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.idempotency import IdempotencyKeys, Made
from serving.jobs_collecting import collect
from serving.jobs_config import JobsConfig
from serving.jobs_lease import Lease
from serving.jobs_record import JobRecord, JobState, new_id
from serving.jobs_store import JobStore
from serving.schemas import GenerationRequest, StartImage
from tests.serving.live_server import until
from tests.serving.small import CARD, ENDLESS, small, told
from tests.serving.test_jobs_api import ended, events, pixels, submit
from training.objectives import Denoiser


def record(**changes: Any) -> JobRecord:
    request = GenerationRequest(prompt="a red circle", seed=3, steps=4, guidance_scale=3.0, width=8, height=8, images=2)
    fields: dict[str, Any] = {
        "id": new_id(),
        "key": None,
        "created_s": time.time(),
        "model": "tiny/3",
        "bundle_sha256": CARD.bundle_sha256,
        "request": request,
        "strength": None,
        "masked": False,
        "output_format": "png",
        "quality": None,
        "webhook_url": None,
        "idempotency": None,
    }
    return JobRecord(**(fields | changes))


def left_by_the_dead(folder: Path, job: JobRecord, attempts: int = 1) -> JobRecord:
    """A job as a replica leaves it that is killed at work."""
    store = JobStore(folder)
    store.create(job, None, JobState(status="running", steps_done=1))
    for number in range(1, attempts + 1):
        attempt = folder / job.id / f"attempt-{number}"
        attempt.touch()
        os.utime(attempt, (0, 0))
    return job


def jobs(folder: Path, **settings: Any) -> JobsConfig:
    return JobsConfig(folder=str(folder), **({"lease_s": 0.4} | settings))


def test_a_job_whose_replica_died_is_made_by_another_with_the_same_seeds(
    denoiser: Denoiser, encoder: Any, tmp_path: Path
) -> None:
    job = left_by_the_dead(tmp_path, record())
    with small(denoiser, encoder, jobs=jobs(tmp_path)) as server:
        status = ended(server, job.id)
        assert (status["status"], [image["seed"] for image in status["images"]]) == ("succeeded", [3, 4])
        same = submit(server, n=2, seed=3, num_inference_steps=4, guidance_scale=3.0)
        for image, other in zip(status["images"], ended(server, same["id"])["images"], strict=True):
            assert np.array_equal(pixels(server.get(image["url"]).content), pixels(server.get(other["url"]).content))


def test_a_replica_that_stops_hands_its_jobs_over_and_any_replica_answers_for_them(
    denoiser: Denoiser, encoder: Any, tmp_path: Path
) -> None:
    config = jobs(tmp_path, lease_s=2.0)
    with small(denoiser, encoder, jobs=config) as other:
        with small(denoiser, encoder, jobs=config) as stopping:
            job = submit(stopping, num_inference_steps=ENDLESS)
            until(lambda: other.get(f"/v1/jobs/{job['id']}").json()["status"] == "running")
            assert other.idle
        until(lambda: other.engine.running_images == 1)
        assert (tmp_path / job["id"] / "attempt-2").exists()
        cancelled = other.post(f"/v1/jobs/{job['id']}/cancel").json()
        assert cancelled["status"] == "cancelled"
        until(lambda: other.idle)


def test_a_job_is_cancelled_through_any_replica(denoiser: Denoiser, encoder: Any, tmp_path: Path) -> None:
    config = jobs(tmp_path)
    with small(denoiser, encoder, jobs=config) as one, small(denoiser, encoder, jobs=config) as other:
        job = submit(one, num_inference_steps=ENDLESS)
        assert other.post(f"/v1/jobs/{job['id']}/cancel").json()["id"] == job["id"]
        assert events(other, job["id"])[-1][1] == "cancelled"
        until(lambda: one.idle)


def test_a_job_that_kills_its_replicas_ends(denoiser: Denoiser, encoder: Any, tmp_path: Path) -> None:
    job = left_by_the_dead(tmp_path, record(), attempts=3)
    with small(denoiser, encoder, jobs=jobs(tmp_path, max_attempts=3)) as server:
        status = ended(server, job.id)
    assert (status["status"], status["error"]["code"]) == ("failed", "attempts_exhausted")
    assert status["error"]["message"] == "3 replicas were lost over this job."


def test_a_job_of_a_model_that_nobody_serves_any_more_fails_and_makes_no_other_picture(
    denoiser: Denoiser, encoder: Any, tmp_path: Path
) -> None:
    job = left_by_the_dead(tmp_path, record())
    newer = dataclasses.replace(CARD, version=4, bundle_sha256="c" * 64)
    with small(denoiser, encoder, jobs=jobs(tmp_path), card=newer) as server:
        status = ended(server, job.id)
    assert (status["status"], status["error"]["code"]) == ("failed", "model_gone")
    assert "tiny/3" in status["error"]["message"]


def test_a_deadline_counts_from_the_first_acceptance(denoiser: Denoiser, encoder: Any, tmp_path: Path) -> None:
    request = record().request.model_copy(update={"deadline_s": 5.0, "steps": ENDLESS})
    job = left_by_the_dead(tmp_path, record(request=request, created_s=time.time() - 100))
    with small(denoiser, encoder, jobs=jobs(tmp_path)) as server:
        status = ended(server, job.id)
        assert (status["status"], status["error"]["code"]) == ("failed", "deadline_exceeded")
        assert server.idle


def test_only_one_replica_has_a_lease_and_a_slow_one_notices(tmp_path: Path) -> None:
    first = Lease.claim(tmp_path, 60)
    assert first is not None
    assert Lease.claim(tmp_path, 60) is None
    assert first.renew()
    first.release()
    second = Lease.claim(tmp_path, 60)
    assert second is not None
    assert (first.attempt, second.attempt) == (1, 2)
    assert not first.renew()
    assert second.renew()
    assert Lease.claim(tmp_path / "gone", 60) is None


def test_an_idempotency_key_whose_replica_died_before_there_was_a_job_comes_free(
    denoiser: Denoiser, encoder: Any, tmp_path: Path
) -> None:
    from serving.idempotency import name_of

    keys = IdempotencyKeys(tmp_path / "idempotency")
    with small(denoiser, encoder, jobs=jobs(tmp_path)) as server:
        submitted = submit(server, {"idempotency-key": "1"})
        made = keys.find(name_of("1", None))
        assert made is not None
        keys.use(name_of("2", None), Made(new_id(), made.body_sha256))
        body = {"prompt": "a red circle"}
        refused = server.post("/v1/jobs", headers={"idempotency-key": "2"}, **body)
        assert (refused.status_code, told(refused)["code"]) == (409, "idempotency_key_in_use")
        assert refused.headers["retry-after"] == "1"
        until(lambda: server.post("/v1/jobs", headers={"idempotency-key": "2"}, **body).status_code == 202)
        assert ended(server, submitted["id"])["status"] == "succeeded"


def test_the_oldest_ended_jobs_make_room_and_unsettled_ones_stay(tmp_path: Path) -> None:
    store, keys = JobStore(tmp_path), IdempotencyKeys(tmp_path / "idempotency")
    made = []
    for number in range(4):
        job = record()
        store.create(job, None, JobState())
        store.add_image(job.id, 0, 3, bytes(600_000))
        webhook = "pending" if number == 0 else None
        if number != 3:
            store.write_state(job.id, JobState(status="succeeded", ended_s=1000.0 + number, webhook=webhook))
        made.append(job.id)
    left = collect(store, keys, JobsConfig(max_bytes=1_900_000), now_s=1010.0)
    assert {*store.all()} == {made[0], made[2], made[3]}
    assert 1_800_000 < left < 1_900_000
    assert store.active() == sorted([made[0], made[3]])
    collect(store, keys, JobsConfig(results_kept_s=5.0), now_s=1010.0)
    assert {*store.all()} == {made[0], made[3]}


def test_a_record_makes_the_same_request_again(tmp_path: Path) -> None:
    from PIL import Image

    start = StartImage(Image.new("RGB", (8, 8), (1, 2, 3)), 0.5, Image.new("L", (8, 8), 255))
    job = record(strength=0.5, masked=True)
    store = JobStore(tmp_path)
    store.create(job, start, JobState())
    again = store.record(job.id)
    assert again == job
    asked = job.asked(*store.pictures(job), time.time())
    assert asked.start is not None
    assert asked.start.mask is not None
    assert (asked.start.strength, asked.steps_left * 2) == (0.5, job.steps)
    assert np.array_equal(np.asarray(asked.start.image), np.asarray(start.image))
    assert np.asarray(asked.start.mask).min() == 255


@pytest.mark.parametrize("text", ["relative/folder", "./x"])
def test_a_folder_that_would_be_another_one_for_each_replica_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be an absolute path"):
        JobsConfig(folder=text)
