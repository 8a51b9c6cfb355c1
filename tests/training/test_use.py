"""What real runs consume: killed and resumed in other worlds, on damaged data; and what `darkroom data audit` says."""

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import checkpoint
from training.data.audit import audit
from training.errors import DataError

Darkroom = Callable[..., "subprocess.CompletedProcess[str]"]
STEPS, SAVE_EVERY, BATCH = 24, 5, 8


def recipe(runs: Any, world: int, **sections: Any) -> dict[str, Any]:
    sections = {"engine": {"precision": "fp32"}, **sections}
    return runs.config(steps=STEPS, workers={"count": world}, checkpoint={"every_steps": SAVE_EVERY}, **sections)


def finish(runs: Any, config: Any, run: str, world: int) -> Any:
    ranks = runs.start(config, run, world)
    assert [rank.end() for rank in ranks] == [0] * world, ranks[0].log.read_text()[-3000:]
    return ranks[0]


def kill(ranks: list[Any], victim: int, running_process: Callable[[Path], int]) -> None:
    os.kill(running_process(ranks[victim].log), signal.SIGKILL)
    codes = [rank.end() for rank in ranks]
    assert codes[victim] == -signal.SIGKILL
    assert all(codes)


def test_killed_again_and_again_in_changing_worlds_nothing_is_lost_or_duplicated(
    runs: Any, running_process: Callable[[Path], int], darkroom: Darkroom
) -> None:
    """Before the first checkpoint alone, then two ranks after a checkpoint, then asked to stop, then to the end."""
    (alone,) = runs.start(recipe(runs, 1), "run", 1)
    alone.until("step")
    kill([alone], 0, running_process)
    killed_at = alone.told("step")[-1]["step"]

    pair = runs.start(recipe(runs, 2), "run", 2)
    assert pair[0].until("step")["step"] == 1, "nothing was saved"
    pair[0].until("checkpoint")
    pair[0].until("step")
    kill(pair, 1, running_process)

    (alone,) = runs.start(recipe(runs, 1), "run", 1)
    resumed = alone.until("resumed")["step"]
    assert resumed >= SAVE_EVERY
    kill([alone], 0, running_process)
    finish(runs, recipe(runs, 2), "run", 2)

    done = darkroom("data", "audit", runs.folder / "run", "--verify", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["steps"], report["consumed"]) == (STEPS, STEPS * BATCH)
    assert (report["lost"], report["duplicated"], report["skipped"], report["findings"]) == (0, 0, {}, [])
    assert report["redone"] >= killed_at
    assert all(epoch["exact"] for epoch in report["epochs"].values() if epoch["due"] == report["samples"])
    found, _ = checkpoint.newest(runs.folder / "run" / "checkpoints")
    assert found is not None
    assert found.about["use"] == {"step": STEPS, "digest": report["digest"], "rows": STEPS * BATCH, "missing": 0}
    said = darkroom("data", "audit", runs.folder / "run").stdout
    assert f"steps {STEPS}, samples consumed {STEPS * BATCH}, lost 0, duplicated 0, skipped 0" in said
    assert "all is accounted for" in said


def test_a_run_that_begins_again_with_another_recipe_owes_nothing_to_the_first(
    runs: Any, running_process: Callable[[Path], int]
) -> None:
    """It was killed before its first checkpoint, so that nothing of what it did is left."""
    ranks = runs.start(recipe(runs, 1), "run", 1)
    ranks[0].until("step")
    kill(ranks, 0, running_process)
    finish(runs, recipe(runs, 1, seed=1), "run", 1)
    report = audit(runs.folder / "run")
    assert (report.steps, report.redone, report.findings) == (STEPS, 0, [])


@pytest.fixture
def damaged(runs: Any, tmp_path: Path) -> Path:
    """The data set, with a picture and the fields of another sample overwritten after it was built."""
    data = tmp_path / "damaged"
    shutil.copytree(runs.data, data)
    index = np.load(data / "train.index.npy", allow_pickle=False)
    with (data / "train-000000.tar").open("r+b") as file:
        for number, part in ((2, "json"), (5, "image")):
            file.seek(int(index[number][f"{part}_offset"]))
            file.write(b"?" * int(index[number][f"{part}_size"]))
    return data


def test_damaged_samples_are_left_out_alike_in_every_world(runs: Any, damaged: Path) -> None:
    """Named once, counted once, in no loss, and nobody else takes their turn."""
    told = {}
    for world, engine in ((1, {}), (2, {}), (2, {"micro_batch": 2, "zero_stage": 2})):
        name = f"world-{world}-{len(engine)}"
        config = recipe(runs, world, data={"path": str(damaged)}, engine={"precision": "fp32", **engine})
        rank = finish(runs, config, name, world)
        told[name] = [event["metrics"] for event in rank.told("step")]
        first, second, closing = [event["message"] for event in rank.told("warning")]
        assert {message.partition(" is left out, for it cannot be read: ")[0] for message in (first, second)} == {
            "train[2]",
            "train[5]",
        }
        file = runs.folder / name / "skipped.jsonl"
        assert closing == f"2 samples of train could not be read; {file} names them."
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert sorted(line["sample_id"] for line in lines) == [2, 5]
        counts = [metrics["skipped_samples"] for metrics in told[name]]
        assert counts == sorted(counts)
        assert counts[-1] == 2
        report = audit(runs.folder / name, verify=True)
        assert (report.lost, report.duplicated, report.findings) == (0, 0, [])
        assert {sample.name for sample in report.skipped.values()} == {"train[2]", "train[5]"}
        assert all(sample.reason and sample.source.endswith(".png") for sample in report.skipped.values())
        whole = [epoch for epoch in report.epochs.values() if epoch.exact]
        assert len(whole) >= 9
        assert {(epoch.used, epoch.skipped) for epoch in whole} == {(report.samples - 2, 2)}
    one, *others = told.values()
    for other in others:
        for metric in ("loss", "gradient_norm"):
            assert [each[metric] for each in other] == pytest.approx([each[metric] for each in one], rel=1e-3), metric


def test_the_other_rows_of_a_batch_do_not_notice(runs: Any, damaged: Path) -> None:
    """Up to the first batch with a damaged sample the losses are those of the whole data set, to the bit."""
    whole = finish(runs, recipe(runs, 1), "whole", 1).told("step")
    broken = finish(runs, recipe(runs, 1, data={"path": str(damaged)}), "broken", 1).told("step")
    first = next(place for place, event in enumerate(broken) if event["metrics"]["skipped_samples"])
    alike = [event["metrics"]["loss"] for event in whole[:first]]
    assert [event["metrics"]["loss"] for event in broken[:first]] == alike
    assert broken[first]["metrics"]["loss"] != whole[first]["metrics"]["loss"]


def test_a_ledger_that_cannot_be_written_ends_all_ranks_in_the_same_words(runs: Any) -> None:
    """The limit on the size of files is lowered to what the ledger has: as a full disk, for rank 0 alone."""
    config = runs.config(steps=100_000, workers={"count": 2}, cost={"energy": False})
    (runs.folder / "full").mkdir()
    (runs.folder / "full" / "rank-0.log").symlink_to("/dev/null")  # a log is a file with a size as well
    pair = runs.start(config, "full", 2)
    for _ in range(3):
        pair[0].until("step")
    pid = json.loads((runs.folder / "full" / "progress" / "rank-0.json").read_text())["pid"]
    size = (runs.folder / "full" / "use" / "steps.bin").stat().st_size
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
    codes = [rank.end() for rank in pair]
    assert codes[0] == codes[1] == 1
    errors = [rank.told("error")[0] for rank in pair]
    assert errors[0]["message"] == errors[1]["message"]
    assert "The ledger of use cannot be written." in errors[0]["message"]
    assert "the same command goes on from the newest checkpoint" in errors[0]["message"]


def test_a_batch_without_a_readable_row_is_passed_over_and_a_vanished_data_set_ends_the_run(
    runs: Any, damaged: Path
) -> None:
    config = recipe(runs, 1, data={"path": str(damaged)}, global_batch=1)
    rank = finish(runs, config, "single", 1)
    without = [event["step"] for event in rank.told("step") if "loss" not in event["metrics"]]
    assert 1 <= len(without) <= 4
    assert audit(runs.folder / "single").findings == []

    with (damaged / "train-000000.tar").open("r+b") as file:
        file.write(b"?" * (damaged / "train-000000.tar").stat().st_size)
    pair = runs.start(recipe(runs, 2, data={"path": str(damaged)}), "gone", 2)
    assert [rank.end() for rank in pair] == [1, 1]
    errors = [rank.told("error")[0] for rank in pair]
    assert all(
        "64 samples in a row cannot be read; the data set is gone or damaged" in each["message"] for each in errors
    )
    assert all(each["typed"] for each in errors)


@pytest.fixture
def finished(runs: Any) -> Path:
    """The folder of a run of six steps."""
    finish(runs, runs.config(checkpoint={"every_steps": 3}), "run", 1)
    return Path(runs.folder / "run")


def test_an_audit_of_a_ledger_that_was_cut_short_names_the_steps(finished: Path, darkroom: Darkroom) -> None:
    ledger = finished / "use" / "steps.bin"
    with ledger.open("r+b") as file:
        file.truncate(ledger.stat().st_size - 2 * 64)
    done = darkroom("data", "audit", finished)
    assert done.returncode == 1
    assert "lost 16, duplicated 0" in done.stdout
    assert "There is no record of steps 5 to 6." in done.stdout
    assert "The ledger does not lead to the checkpoint of step 6" in done.stdout
    assert "Traceback" not in done.stderr


def test_an_audit_needs_the_run_and_its_own_data_set(
    runs: Any, finished: Path, damaged: Path, darkroom: Darkroom, tmp_path: Path
) -> None:
    altered = json.loads((finished / "use" / "recipe.json").read_text())
    (tmp_path / "other" / "use").mkdir(parents=True)
    shutil.copy(finished / "use" / "steps.bin", tmp_path / "other" / "use")
    (tmp_path / "other" / "use" / "recipe.json").write_text(json.dumps({**altered, "data_hash": "cd" * 32}))
    with pytest.raises(DataError, match="The run was trained on another data set") as wrong:
        audit(tmp_path / "other")
    assert "--data names the folder" in str(wrong.value)
    (tmp_path / "other" / "use" / "steps.bin").unlink()
    with pytest.raises(DataError, match="There is no ledger of use"):
        audit(tmp_path / "other")
    none = darkroom("data", "audit", "nobody")
    assert none.returncode == 1
    assert "The run has no ledger of use." in none.stderr
    report = audit(finished, str(damaged), verify=True)
    assert [finding.kind for finding in report.findings] == ["picture"]
    assert "train[5]" in report.findings[0].message, "the index is right, and the picture is not the one it names"
    index = damaged / "train.index.npy"
    content = bytearray(index.read_bytes())
    content[-20] ^= 1
    index.write_bytes(content)
    with pytest.raises(Exception, match="The index is not the one that the data set was built with"):
        audit(finished, str(damaged))
