"""What a device can compute, for the share of it that training uses (MFU)."""

from __future__ import annotations

import time
from dataclasses import dataclass

TERA = 1e12
GIB = 1024**3


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        bf16_tflops: dense products in bf16 or fp16 with fp32 sums, 1e12 FLOP/s; none of the figures with sparsity.
        fp32_tflops: products in fp32 outside of tensor cores, as torch computes by default.
        memory_gib: of the card.
    """

    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float


CARDS = {
    "B200": Card(2250, 75, 180),
    "H200": Card(989.4, 66.9, 141),
    "H100 NVL": Card(835, 60, 94),
    "H100 PCIe": Card(756, 51.2, 80),
    "H100": Card(989.4, 66.9, 80),
    "A100-SXM4-80GB": Card(312, 19.5, 80),
    "A100 80GB": Card(312, 19.5, 80),
    "A100-80G": Card(312, 19.5, 80),
    "A100": Card(312, 19.5, 40),
    "L40S": Card(362, 91.6, 48),
    "L40": Card(181, 90.5, 48),
    "L4": Card(121, 30.3, 24),
    "A40": Card(149.7, 37.4, 48),
    "A30": Card(165, 10.3, 24),
    "A10G": Card(70, 31.5, 24),
    "A10": Card(125, 31.2, 24),
    "V100": Card(125, 15.7, 16),
    "T4": Card(65, 8.1, 16),
    "RTX 4090": Card(165.2, 82.6, 24),
    "RTX 3090": Card(71, 35.6, 24),
}
"""By a part of the name that the driver or Ray gives; the first that fits counts. From NVIDIA's data sheets (B200,
H200, H100, A100, L40S, L40, L4, A40, A30, A10, V100, T4), Ada and Ampere white papers (RTX), and AWS (A10G)."""


def card(name: str) -> Card | None:
    """The card whose name ``name`` contains; None for one that is not listed."""
    words = name.lower()
    return next((card for part, card in CARDS.items() if part.lower() in words), None)


def gpu_peak(name: str, precision: str) -> float | None:
    """FLOP/s of a GPU at most; None where it is not listed."""
    found = card(name)
    if found is None:
        return None
    return TERA * (found.fp32_tflops if precision == "fp32" else found.bf16_tflops)


def cpu_peak(threads: int, precision: str, side: int = 512, tries: int = 8, patience_s: float = 0.2) -> float:
    """FLOP/s of this machine's CPU with so many threads: the best of a few products of square matrices.

    Measured, for what a CPU sustains follows from its clocks, units and neighbours. It stops trying after
    ``patience_s``: a CPU without bf16 units takes long for one product.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = torch.ones(side, side, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
        began, best_s = time.perf_counter(), _timed(matrix)
        while (tries := tries - 1) and time.perf_counter() - began < patience_s:
            best_s = min(best_s, _timed(matrix))
    finally:
        torch.set_num_threads(before)
    return 2.0 * side**3 / best_s


def _timed(matrix: object) -> float:
    began = time.perf_counter()
    matrix @ matrix  # type: ignore[operator]
    return time.perf_counter() - began


def mfu(flops_per_image: float, images_per_s: float, peak_flops: float) -> float:
    """The share of what the devices can compute that the network's own products use (Chowdhery et al. 2022, 4.1).

    Recomputed activations do not count.

    Args:
        flops_per_image: of forward and backward.
        images_per_s: of all workers.
        peak_flops: of all workers' devices together.
    """
    return flops_per_image * images_per_s / peak_flops
