"""What training shows of itself where there is no terminal."""

import pytest

from cluster import progress
from cluster.progress import TrainProgress


def test_an_encoding_that_the_steps_wait_for_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", -1.0)
    with TrainProgress(steps=10, global_batch=4, began_s=0.0) as shown:
        shown.on_event({"event": "encoding", "done": 1200, "total": 60000})
        shown.on_event({"event": "encoding", "done": 60000, "total": 60000, "label": "007"})
    told = capsys.readouterr().err
    assert "encoding captions: 1,200 of 60,000 samples" in told
    assert "trial 007: encoding captions: 60,000 of 60,000 samples" in told
