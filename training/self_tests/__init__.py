"""Self-tests of the real engine on the machines that will train: what failed silently elsewhere is measured here.

One file per check. Its ``check`` is called on every rank together, trains or reads for a second or two, and returns a
finding; where it has a ``prepare``, that is called before, in processes that are then killed.
"""

from __future__ import annotations

CHECKS = {
    "precision": "products and sums over ranks are right",
    "zero_stages": "every ZeRO stage trains as DistributedDataParallel does",
    "master_weights": "the weights that are updated are fp32",
    "average": "the averaged weights move, as their formula says",
    "muon": "Muon orthogonalises its updates",
    "resume": "what goes on from storage or the node's memory has the same losses",
    "samples": "every sample is read once an epoch, by one rank",
    "latents": "a kept latent is what encoding its picture now gives",
}
"""What is checked, in this order, by the name of its file."""

PREPARED = frozenset({"resume"})
"""Those with a ``prepare``."""
