"""Tiny pipelines of every layout, with random weights, saved as diffusers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLIP_WIDTH, T5_WIDTH, GEMMA_WIDTH = 32, 64, 8
FACTOR = 8
SIDE = 32
"""Of the pictures, in pixels; a latent has a quarter of a row of it."""


def clip(out: Path, *, projected: bool) -> tuple[Any, Any]:
    """A CLIP text encoder and its tokenizer, which spells."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (out / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(out, model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=CLIP_WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=CLIP_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), tokenizer


def speller(end: str) -> Any:
    """A tokenizer that spells, and pads on the right."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, end: 1, "<unk>": 2, **{letter: 3 + place for place, letter in enumerate("abcdefghijklmnop")}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    after = end == "</s>"
    inner.post_processor = processors.TemplateProcessing(
        single=f"$A {end}" if after else f"{end} $A", special_tokens=[(end, 1)]
    )
    names = {"eos_token": end} if after else {"bos_token": end}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", padding_side="right", **names
    )


def t5() -> tuple[Any, Any]:
    """A T5 encoder and its tokenizer."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=20, d_model=T5_WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return T5EncoderModel(config), speller("</s>")


def autoencoder(shift: float | None = None) -> Any:
    """An autoencoder that halves a side three times."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=shift,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        scaling_factor=0.18215,
    )


def unet(**options: Any) -> Any:
    """A UNet with captions."""
    from diffusers import UNet2DConditionModel

    told = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": SIDE // FACTOR,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": CLIP_WIDTH,
    }
    return UNet2DConditionModel(**{**told, **options})


def sd(work: Path, prediction: str = "epsilon") -> Any:
    """Stable Diffusion 1.x; 2.x with v."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    encoder, tokenizer = clip(work, projected=False)
    return StableDiffusionPipeline(
        unet=unet(),
        vae=autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type=prediction,
            timestep_spacing="trailing",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(work: Path) -> Any:
    """SDXL."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    (first, tokenizer), (second, _) = clip(work, projected=False), clip(work, projected=True)
    return StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=2 * CLIP_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=CLIP_WIDTH + 6 * 8,
            use_linear_projection=True,
        ),
        vae=autoencoder(),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    )


def sd3(work: Path, *, third: bool = True) -> Any:
    """Stable Diffusion 3, with its third encoder or without."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    (first, tokenizer), (second, _) = clip(work, projected=True), clip(work, projected=True)
    last = t5() if third else (None, None)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIDE // FACTOR,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * CLIP_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=8,
        ),
        vae=autoencoder(shift=0.1),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=last[0],
        tokenizer_3=last[1],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(work: Path) -> Any:
    """FLUX.1 dev."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    (first, tokenizer), (second, tokenizer_2) = clip(work, projected=False), t5()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        vae=autoencoder(shift=0.1),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def pixart(work: Path) -> Any:
    """PixArt-alpha."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    encoder, tokenizer = t5()
    return PixArtAlphaPipeline(
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=SIDE // FACTOR,
            patch_size=2,
            caption_channels=T5_WIDTH,
            use_additional_conditions=False,
        ),
        vae=autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(clip_sample=False),
    )


def sana(work: Path) -> Any:
    """Sana."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    encoder = Gemma2Model(
        Gemma2Config(
            head_dim=8,
            hidden_size=GEMMA_WIDTH,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=20,
            pad_token_id=0,
        )
    )
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=GEMMA_WIDTH,
            sample_size=SIDE // 2,
        ),
        vae=vae,
        text_encoder=encoder,
        tokenizer=speller("<bos>"),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", solver_order=1
        ),
    )


LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "sd": sd,
    "sd-v": lambda work: sd(work, "v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3-two-encoders": lambda work: sd3(work, third=False),
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
}


def saved(layout: str, out: Path) -> Path:
    """A tiny pipeline of a layout, saved."""
    torch.manual_seed(0)
    pipe = LAYOUTS[layout](out.parent / f"{out.name}-tokenizer")
    for name in ("unet", "transformer"):
        network = getattr(pipe, name, None)
        for parameter in network.parameters() if network else ():
            if not parameter.any():  # what starts at zero would hide a wrong input
                torch.nn.init.normal_(parameter, std=0.05)
    pipe.save_pretrained(out, safe_serialization=True)
    return out
