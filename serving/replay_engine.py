"""A picture made again on this machine: the bundle in an engine that is run as the parameters say."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import torch

from serving.config import BatchConfig, LimitConfig, ServeConfig
from serving.errors import EngineError
from serving.model import load_model, pinned
from serving.observer import Silent
from serving.parameters import Parameters, parameters_of
from serving.replay import another_model
from serving.schemas import GenerationRequest, ImageReady, StartImage
from serving.speed import SpeedConfig
from serving.studio import execution_of, written
from training.errors import UsageError

_REQUEST = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "sampler", "width", "height")
"""The parameters that the engine is asked with."""


async def made_by(bundle: Path, parameters: Parameters, start: StartImage | None) -> bytes:
    """The file that a bundle makes of the parameters.

    Raises:
        UsageError: the bundle is another model, the picture needs an adapter, or the request does not fit the model.
        ServeError, CheckpointError: the bundle does not load.
        EngineError: denoising failed.
    """
    told = parameters.execution
    if parameters.adapter is not None:
        rule = "a bundle holds no adapters"
        raise UsageError(
            "The picture was made with an adapter.", value=parameters.adapter, rule=rule, mend="--url of its endpoint"
        )
    device = "cuda" if told.device.startswith("cuda") and torch.cuda.is_available() else "cpu"
    config = pinned(
        ServeConfig(
            model=str(bundle),
            replica_gpus=1.0 if device == "cuda" else 0.0,
            batch=BatchConfig(padded_rows=told.padded_rows, max_batch_rows=max(8, told.padded_rows)),
            speed=SpeedConfig(step_cache=told.step_cache, compiled=told.compiled, bf16=told.precision == "bfloat16"),
            limits=LimitConfig(max_pixels=parameters.width * parameters.height),
        )
    )
    if config.pinned is None or config.pinned.sha256 != parameters.bundle_sha256:
        raise another_model(parameters, f"bundle_sha256 {config.pinned and config.pinned.sha256} in {bundle}")
    torch.set_num_threads(told.threads)
    model = load_model(config)
    engine = model.engine(config, Silent())
    request = GenerationRequest(**parameters.model_dump(include=set(_REQUEST)), start=start)
    async with engine, aclosing(engine.submit(request)) as events:
        async for event in events:
            if isinstance(event, ImageReady):
                again = parameters_of(
                    request,
                    seed=event.seed,
                    card=model.card,
                    execution=execution_of(engine, request),
                    output_format=parameters.output_format,
                    quality=parameters.quality,
                    watermark_strength=parameters.watermark_strength,
                )
                return written(event.image, again)
    raise EngineError("The engine ended without a picture.")
