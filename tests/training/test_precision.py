from __future__ import annotations

import pytest
import torch

from training.precision import resolve


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": False, "num_sockets": 1}, "fp32"),
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": True}, "bf16"),
        ({"sve_bf16": True}, "bf16"),
        ({}, "fp32"),
    ],
)
def test_auto_is_what_the_cpu_multiplies_itself(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, object], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    assert resolve("auto") == expected
    assert resolve("bf16") == "bf16", "who asks for it gets it"
    assert resolve("fp32") == "fp32"
