"""What ``darkroom data audit`` prints of a run's epochs."""

from __future__ import annotations

import re

import pytest

from cluster.commands.data.audit import _print
from training.data.audit_report import AuditReport, EpochUse, UndoneSteps


def test_epochs_that_went_alike_share_a_line_and_none_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    whole, damaged, begun = EpochUse(10, 10, 0, True), EpochUse(10, 9, 1, True), EpochUse(4, 4, 0, None)
    epochs = {number: damaged if number == 2000 else whole for number in range(3000)} | {3000: begun}
    facts = {"run": "r", "dataset": "d", "data_hash": "h", "split": "train", "samples": 10, "steps": 1}
    _print(AuditReport(**facts, epochs=epochs))
    lines = [re.sub(r"\W+", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    table = lines[lines.index("epochs due in each consumed skipped every sample once") :]
    rows = [line for line in table if line[:1].isdigit()]
    assert rows == ["0 to 1999 10 10 0 yes", "2000 10 9 1 yes", "2001 to 2999 10 10 0 yes", "3000 4 4 0 not over"]


def test_steps_that_are_not_in_the_weights_are_told_with_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"run": "r", "dataset": "d", "data_hash": "h", "split": "train", "samples": 10, "steps": 30}
    undone = [UndoneSteps(7, 7, "not finite: loss nan"), UndoneSteps(11, 15, "loss 9 is a spike"), UndoneSteps(20, 20)]
    _print(AuditReport(**facts, undone=undone))
    lines = capsys.readouterr().out.splitlines()
    assert "steps undone 7" in "".join(lines[:4])
    assert [line for line in lines if line.startswith("undone: ")] == [
        "undone: step 7, not in the weights: not finite: loss nan",
        "undone: steps 11 to 15, not in the weights: loss 9 is a spike",
        "undone: step 20, not in the weights: no reason is noted",
    ]
