"""Calls of the network that make no picture: they warm it up and are timed."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch

from serving.batching import predict
from serving.preparing import Preparing
from serving.widths import Size
from training.objectives import Denoiser


def device_name(device: str) -> str:
    """What calls of the network are timed on, with torch's version: on another one the best width may be another."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)} torch {torch.__version__}"
    return f"{platform.machine()} {torch.get_num_threads()} threads torch {torch.__version__}"


def warm(denoiser: Denoiser, preparing: Preparing, size: Size) -> Callable[[int], None]:
    """What calls the network once with so many rows of a size, and waits for its end.

    Args:
        denoiser: the model.
        preparing: what images are made with.
        size: of the pictures.
    """
    canvas, device = preparing.canvas, preparing.device
    shape = (canvas.channels, size.height // canvas.factor, size.width // canvas.factor)

    @torch.inference_mode()
    def call(rows: int) -> None:
        told = preparing.encoder.encode([""]).to(device).rows([0] * rows)
        x, t = torch.zeros(rows, *shape, device=device), torch.full((rows,), 0.5, device=device)
        made = predict(denoiser, x, t, told, rows)
        float(made.flatten()[0])  # waits for the device

    return call
