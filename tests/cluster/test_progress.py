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


def test_the_end_accounts_for_time_cost_and_the_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    event = {
        "event": "account",
        "steps": 100,
        "time_s": {"data": 0.1, "forward": 2.0, "backward": 4.0},
        "metrics": {
            "cost/gpu_hours": 0.0,
            "cost/cpu_hours": 1.5,
            "cost/money": 0.15,
            "cost/energy_kwh": 0.02,
            "cost/co2_kg": 0.0076,
            "actual_over_forecast/images_per_s": 1.25,
            "actual_over_forecast/memory_bytes": 0.9,
        },
        "currency": "EUR",
    }
    with TrainProgress(steps=100, global_batch=4, began_s=0.0) as shown:
        shown.on_event(event)
    told = capsys.readouterr().err
    assert "milliseconds a step: data 1.0, forward 20.0, backward 40.0" in told
    assert "the run has used 1.500 CPU hours, 0.15 EUR, 0.0200 kWh, 7.6 g CO2" in told
    assert "rate 1.25 of the forecast's, memory 0.90 of the forecast's" in told
