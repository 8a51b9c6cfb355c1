"""Samplers over the denoiser contract.

A sampler is what a trajectory does with the clean image that the denoiser predicts for it: one evaluation in, one
move out. Trajectories at different times, of different lengths and of different samplers share a batch.
"""

from training.samplers.grids import times
from training.samplers.guidance import Guided, rescaled
from training.samplers.moves import advance, euler_step
from training.samplers.sample import sample
from training.samplers.trajectory import Trajectory

__all__ = ["Guided", "Trajectory", "advance", "euler_step", "rescaled", "sample", "times"]
