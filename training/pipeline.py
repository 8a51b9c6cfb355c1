"""The pipeline that travels inside every bundle: captions, classes or nothing to pictures, in pixels or latents.

This file is copied into bundles and runs where Darkroom is not installed, so it imports torch, diffusers and
transformers only. diffusers 0.42 has a pipeline of its own for some of these networks, each with an encoder, an
autoencoder and a scheduler of one kind; this one takes any of ours together, hence ``trust_remote_code=True`` where a
bundle is loaded:

    DiffusionPipeline.from_pretrained("bundle", trust_remote_code=True)("a robot face").images[0]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor


class Told(NamedTuple):
    """What the network is told about each row; only what it knows is not None."""

    states: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    def repeated(self, count: int) -> Told:
        """Each row, ``count`` times in a row."""
        return Told(*(None if part is None else part.repeat_interleave(count, 0) for part in self))


class DarkroomPipeline(DiffusionPipeline):
    """Pictures from a UNet or a transformer.

    Args:
        scheduler: Euler's method on the times that the network's objective is sampled at.
        unet: the network, or None.
        transformer: the network, where it is none of the UNets.
        text_encoder: gives token states, of which masked ones are zero; None where there are no captions.
        tokenizer: pads captions to its ``model_max_length``.
        vae: decodes latents; None where the network draws pixels.
        classes: the names of the classes by number; None where there are none.
    """

    model_cpu_offload_seq: str = "text_encoder->unet->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["unet", "transformer", "text_encoder", "tokenizer", "vae"]  # noqa: RUF012 - diffusers' own

    def __init__(
        self,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        vae: Any = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        modules = {"unet": unet, "transformer": transformer, "text_encoder": text_encoder, "tokenizer": tokenizer}
        self.register_modules(scheduler=scheduler, vae=vae, **modules)  # type: ignore[no-untyped-call]
        self.register_to_config(classes=None if classes is None else list(classes))  # type: ignore[no-untyped-call]
        self.image_processor = VaeImageProcessor(do_resize=False)

    @property
    def network(self) -> Any:
        """Whichever there is."""
        return self.unet if self.unet is not None else self.transformer

    def encode(self, prompts: Sequence[str]) -> Told:
        """What the network is told, a row per prompt.

        Raises:
            ValueError: a prompt is longer than the model reads, names no class, or is of no use.
        """
        if self.text_encoder is not None:
            return self._captions(prompts)
        names = self.config["classes"] or []
        for prompt in prompts:
            if prompt and prompt not in names:
                raise ValueError(f"{prompt!r} is no class of this model; it has {len(names)}: {', '.join(names[:20])}")
        numbers = [names.index(prompt) if prompt else len(names) for prompt in prompts]
        return Told(labels=torch.tensor(numbers, device=self._execution_device))

    def _captions(self, prompts: Sequence[str]) -> Told:
        limit = self.tokenizer.model_max_length
        for prompt in prompts:
            count = len(self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
            if count > limit:
                raise ValueError(f"The prompt {prompt!r} has {count} tokens; this model reads at most {limit}.")
        inputs = self.tokenizer(list(prompts), padding="max_length", max_length=limit, return_tensors="pt")
        inputs = inputs.to(self._execution_device)
        found = self.text_encoder(**inputs)
        mask = inputs["attention_mask"].bool()
        states = (found.last_hidden_state * mask[..., None]).to(self.network.dtype)
        if self.text_encoder.config.model_type == "clip_text_model":
            pooled = found.pooler_output.to(states.dtype)
        else:
            pooled = states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return Told(states, mask, pooled)

    def predict(self, x: torch.Tensor, t: torch.Tensor, told: Told) -> torch.Tensor:
        """The network's output, of the shape of ``x``."""
        kind, times = type(self.network).__name__, t.to(x.device).expand(len(x))
        if kind == "UNet2DConditionModel":
            told_so = {"encoder_hidden_states": told.states, "encoder_attention_mask": told.mask}
        elif kind == "UNet2DModel":
            told_so = {"class_labels": None if self.config["classes"] is None else told.labels}
        elif kind == "DiTTransformer2DModel":
            told_so = {"class_labels": told.labels}
        elif kind == "SD3Transformer2DModel":
            told_so = {"encoder_hidden_states": told.states, "pooled_projections": told.pooled}
        else:
            told_so = {"encoder_hidden_states": told.states, "encoder_attention_mask": told.mask}
            told_so["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}  # type: ignore[assignment]
        output: torch.Tensor = self.network(x, timestep=times, return_dict=False, **told_so)[0]
        return output[:, : x.shape[1]]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        negative_prompt: str | list[str] = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Pictures for the prompts.

        Args:
            prompt: what to draw: a caption, or the name of a class; empty is whatever the model has seen.
            negative_prompt: what to move away from; one for all, or one per prompt.
            num_inference_steps: steps of Euler's method.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022, eq. 6); 1 turns it off.
            num_images_per_prompt: pictures per prompt.
            generator: draws the initial noise.
            latents: the initial noise itself, of the shape that the network sees, standard normal; ``generator`` is
                then unused.
            output_type: ``"pil"``, ``"np"`` (0..1, channels last) or ``"pt"`` (0..1, channels first).
            return_dict: give an ``ImagePipelineOutput`` and not a tuple.

        Raises:
            ValueError: prompts of different counts, a prompt that the model cannot be told, or noise of another shape.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts came with {len(prompts)} prompts: one each, or one.")
        guided = guidance_scale != 1
        told = self.encode(prompts + negatives if guided else prompts).repeated(num_images_per_prompt)
        x = self._noise(len(prompts) * num_images_per_prompt, generator, latents)
        self._set_times(num_inference_steps, x.device)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            predicted = self.predict(torch.cat([seen, seen]) if guided else seen, t, told)
            if guided:
                positive, negative = predicted.chunk(2)
                predicted = negative + guidance_scale * (positive - negative)
            x = self.scheduler.step(predicted, t, x, return_dict=False)[0]
        images = self.image_processor.postprocess(self._pictures(x), output_type=output_type)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _set_times(self, steps: int, device: torch.device) -> None:
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)

    def _pictures(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in -1..1 of what the network made."""
        if self.vae is not None:
            told = self.vae.config
            scale, shift = torch.tensor(told.scaling_factor), torch.tensor(told.get("shift_factor") or 0.0)
            if told.get("latents_mean") and told.get("latents_std"):
                scale = scale / torch.tensor(told.latents_std).reshape(1, -1, 1, 1)
                shift = torch.tensor(told.latents_mean).reshape(1, -1, 1, 1)
            x = self.vae.decode((x / scale.to(x) + shift.to(x)).to(self.vae.dtype), return_dict=False)[0]
        return x.clamp(-1, 1)

    def _noise(
        self, count: int, generator: torch.Generator | list[torch.Generator] | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        side = self.network.config.sample_size
        shape = (count, self.network.config.in_channels, side, side)
        device, dtype = self._execution_device, self.network.dtype
        if latents is None:
            drawn: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            return drawn
        if latents.shape != shape:
            raise ValueError(f"The noise has shape {tuple(latents.shape)}; these prompts need {shape}.")
        moved: torch.Tensor = latents.to(device, dtype)
        return moved
