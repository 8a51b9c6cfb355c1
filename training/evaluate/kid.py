"""Kernel Inception Distance's estimator over EfficientNet features: how far generated pictures are from real ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from training import noise
from training.errors import UsageError
from training.evaluate.features import FEATURES, EfficientNetFeatures


@dataclass(frozen=True)
class Kid:
    """A kernel distance; 0 for equal distributions, and unbiased, so it may fall a little below 0.

    Attributes:
        mean: over the subsets.
        std: over the subsets.
        subset_size: pictures of each side in one subset.
        subsets: how many were drawn.
        features: what the pictures were compared by; figures over other features do not compare.
    """

    mean: float
    std: float
    subset_size: int
    subsets: int
    features: str = FEATURES


def kid(
    generated: torch.Tensor,
    real: torch.Tensor,
    *,
    subset_size: int,
    subsets: int,
    seed: int,
    extractor: EfficientNetFeatures | None = None,
) -> Kid:
    """The polynomial-kernel MMD of Bińkowski et al. 2018, "Demystifying MMD GANs", section 4, over random subsets.

    Args:
        generated: uint8 ``[N,3,H,W]``.
        real: uint8 ``[M,3,H,W]``.
        subset_size: 2 to min(N, M).
        subsets: more give a steadier mean.
        seed: chooses the subsets.
        extractor: reuse one that is loaded.

    Raises:
        UsageError: too few pictures for the subset size.
    """
    most = min(len(generated), len(real))
    if not 2 <= subset_size <= most or subsets < 1:
        raise UsageError(
            "The kernel distance cannot be estimated.",
            value=f"subset_size={subset_size}, subsets={subsets}",
            rule=f"2 <= subset_size <= {most} (the smaller of {len(generated)} generated, {len(real)} real)"
            " and subsets >= 1",
        )
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        # it warns that features stay in memory: some thousand rows of 5 kB
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")
        metric = KernelInceptionDistance(
            feature=extractor or EfficientNetFeatures(), subsets=subsets, subset_size=subset_size
        )
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(noise.generator(seed, "kid").integers(2**62)))
        mean, std = metric.compute()
    return Kid(float(mean), float(std), subset_size, subsets)
