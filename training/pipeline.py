"""The pipeline that travels inside every bundle: text to image in pixel space by rectified flow.

This file is copied into bundles and runs where Darkroom is not installed, so it imports torch, diffusers and
transformers only. diffusers 0.42 has no pipeline of its own for a pixel-space UNet2DConditionModel with a
BERT-like encoder (its IFPipeline expects a predicted variance and ignores the caption's mask), hence this class,
and hence ``trust_remote_code=True`` where a bundle is loaded:

    DiffusionPipeline.from_pretrained("bundle", trust_remote_code=True)("a robot face").images[0]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class DarkroomPipeline(DiffusionPipeline):
    """Text to image with a UNet that predicts rectified flow's velocity (Liu et al. 2022).

    Args:
        unet: predicts ``noise - image`` from ``[B,3,R,R]`` pixels in -1..1 at time 0..1000.
        scheduler: Euler's method with the time shift that the model was trained with.
        text_encoder: gives token states; masked states are zero.
        tokenizer: pads captions to its ``model_max_length``.
    """

    model_cpu_offload_seq: str = "text_encoder->unet"  # type: ignore[assignment]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)  # type: ignore[no-untyped-call]
        self.image_processor = VaeImageProcessor(do_resize=False)

    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states ``[B, tokens, width]`` and their mask ``[B, tokens]``.

        Raises:
            ValueError: a prompt is longer than the model reads.
        """
        limit = self.tokenizer.model_max_length
        for prompt in prompts:
            count = len(self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
            if count > limit:
                raise ValueError(f"The prompt {prompt!r} has {count} tokens; this model reads at most {limit}.")
        inputs = self.tokenizer(list(prompts), padding="max_length", max_length=limit, return_tensors="pt")
        inputs = inputs.to(self._execution_device)
        states = self.text_encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()
        return (states * mask[..., None]).to(self.unet.dtype), mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
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
            prompt: what to draw.
            negative_prompt: what to move away from; one for all, or one per prompt.
            num_inference_steps: evenly spaced steps of Euler's method before the scheduler's shift.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022, eq. 6); 1 turns it off.
            num_images_per_prompt: pictures per prompt.
            generator: draws the initial noise.
            latents: the initial noise itself, ``[B,3,R,R]``, standard normal; ``generator`` is then unused.
            output_type: ``"pil"``, ``"np"`` (0..1, channels last) or ``"pt"`` (0..1, channels first).
            return_dict: give an ``ImagePipelineOutput`` and not a tuple.

        Raises:
            ValueError: prompts of different counts, a prompt that is too long, or noise of another shape.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts came with {len(prompts)} prompts: one each, or one.")
        guided = guidance_scale != 1
        states, mask = self.encode(prompts + negatives if guided else prompts)
        states = states.repeat_interleave(num_images_per_prompt, 0)
        mask = mask.repeat_interleave(num_images_per_prompt, 0)
        x = self._noise(len(prompts) * num_images_per_prompt, generator, latents)
        self.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps), device=x.device
        )
        for t in self.progress_bar(self.scheduler.timesteps):
            both = torch.cat([x, x]) if guided else x
            velocity = self.unet(both, t, encoder_hidden_states=states, encoder_attention_mask=mask, return_dict=False)[
                0
            ]
            if guided:
                positive, negative = velocity.chunk(2)
                velocity = negative + guidance_scale * (positive - negative)
            x = self.scheduler.step(velocity, t, x, return_dict=False)[0]
        images = self.image_processor.postprocess(x.clamp(-1, 1), output_type=output_type)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self, count: int, generator: torch.Generator | list[torch.Generator] | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        side = self.unet.config.sample_size
        shape = (count, self.unet.config.in_channels, side, side)
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            drawn: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            return drawn
        if latents.shape != shape:
            raise ValueError(f"The noise has shape {tuple(latents.shape)}; these prompts need {shape}.")
        moved: torch.Tensor = latents.to(device, dtype)
        return moved
