"""Self-tests of the engine: they pass on what is right, and name what was broken on purpose."""

from __future__ import annotations

import json
from typing import Any

import pytest

from training.self_tests import CHECKS
from training.self_tests.finding import Finding, measured, parse, reached


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, warm: Any) -> dict[str, Finding]:
    """The finding of every case of ``self_test_ranks.py``."""
    out = tmp_path_factory.mktemp("self-tests")
    warm.run("self_test_ranks", out)
    return {path.stem: parse(json.loads(path.read_text())) for path in out.glob("*.json")}


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_engine_passes(found: dict[str, Finding], check: str) -> None:
    finding = found[check]
    assert finding.name == check
    assert finding.ok, finding
    assert finding.mend is None
    assert finding.figure is not None
    assert finding.tolerance is not None


@pytest.mark.parametrize(
    ("case", "check", "said"),
    [
        ("an average that is frozen", "average", "moved by 0.0e+00"),
        ("an average that starts cold", "average", "of the formula"),
        ("a lost micro-batch", "zero_stages", "micro-batches of 2"),
        ("rounded weights", "master_weights", "0% of the values"),
        ("a garbled sum", "precision", "a sum over 2 ranks"),
        ("plain momentum", "muon", "largest singular value"),
        ("a forgotten average", "resume", "losses, weights and averages"),
        ("ranks that read the same", "samples", "two ranks read the same rows"),
        ("latents of another scale", "latents", "of encoding the picture now"),
    ],
)
def test_what_is_broken_is_named_with_what_to_do(found: dict[str, Finding], case: str, check: str, said: str) -> None:
    finding = found[case]
    assert (finding.name, finding.ok) == (check, False)
    assert said in finding.detail
    assert finding.mend


def test_a_figure_that_is_no_number_is_never_right() -> None:
    assert not measured("x", float("nan"), 1.0, "", "mend").ok
    assert not reached("x", float("nan"), 1.0, "", "mend").ok
    assert measured("x", 1.0, 1.0, "", "mend").ok
    assert reached("x", 1.0, 1.0, "", "mend").ok
