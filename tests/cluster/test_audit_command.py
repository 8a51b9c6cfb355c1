"""What ``darkroom data audit`` prints of a run's epochs."""

from __future__ import annotations

import re

import pytest

from cluster.commands.data.audit import _print
from training.data.audit_report import AuditReport, EpochUse


def test_epochs_that_went_alike_share_a_line_and_none_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    whole, damaged, begun = EpochUse(10, 10, 0, True), EpochUse(10, 9, 1, True), EpochUse(4, 4, 0, None)
    epochs = {number: damaged if number == 2000 else whole for number in range(3000)} | {3000: begun}
    facts = {"run": "r", "dataset": "d", "data_hash": "h", "split": "train", "samples": 10, "steps": 1}
    _print(AuditReport(**facts, epochs=epochs))
    lines = [re.sub(r"\W+", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    table = lines[lines.index("epochs due in each consumed skipped every sample once") :]
    rows = [line for line in table if line[:1].isdigit()]
    assert rows == ["0 to 1999 10 10 0 yes", "2000 10 9 1 yes", "2001 to 2999 10 10 0 yes", "3000 4 4 0 not over"]
