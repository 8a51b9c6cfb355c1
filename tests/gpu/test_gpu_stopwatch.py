"""On a GPU a section is what the device spends on the work that was queued inside it."""

import pytest
import torch

from training.stopwatch import Stopwatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_a_section_is_the_device_s_time_and_nothing_waits_for_it() -> None:
    matrix = torch.ones(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    clock = Stopwatch(cuda=True)
    with clock("forward"):
        for _ in range(50):
            matrix @ matrix
    with clock("optimizer"):
        matrix + matrix
    totals = clock.totals(wait=True)
    # 50 products of 1.1e12 FLOP: no card does them in 10 ms
    assert totals["forward"] > 0.01
    assert totals["forward"] > 5 * totals["optimizer"]
