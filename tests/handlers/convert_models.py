"""Tiny models of every family's real classes, with random weights, for the tests of conversion."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil, T5Config, T5EncoderModel

from handlers.models.miniature import drawing, sd2, sdxl
from handlers.models.miniature.seeded import seeded

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "flux", "sd1-inpainting")
FLUX_WIDTH = 32


def build(family: str, folder: Path) -> Path:
    """Write the Diffusers folder of a tiny model; the same weights every time."""
    return save(lambda: _pipeline(family), folder)


def save(make: Callable[[], Any], folder: Path) -> Path:
    """Write what ``make`` makes, with every parameter stirred; the same weights every time."""
    with seeded(5), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = make()
        for name in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2"):
            _stir(getattr(pipeline, name, None))
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _stir(model: Any) -> None:
    """Give every parameter values of its own: zeros and ones of fresh norms would hide an exchange."""
    with torch.no_grad():
        for parameter in model.parameters() if model is not None else ():
            parameter.add_(0.02 * torch.randn_like(parameter))


def _pipeline(family: str) -> Any:
    if family == "sd1":
        return drawing.pipeline()
    if family == "sd2":
        return sd2.pipeline()
    if family == "sdxl":
        return sdxl.pipeline()
    if family == "sd2-depth":
        return _depth()
    if family == "sd1-inpainting":
        parts = drawing.pipeline(unet=drawing.unet(in_channels=9)).components
        return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    return _refiner() if family == "sdxl-refiner" else flux()


def _depth() -> Any:
    parts = sd2.pipeline().components
    del parts["safety_checker"], parts["image_encoder"]
    parts["unet"] = drawing.unet(
        in_channels=5,
        block_out_channels=(24, 40, 48, 48),
        attention_head_dim=sd2.HEADS,
        use_linear_projection=True,
        norm_num_groups=4,
    )
    estimator = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    parts["scheduler"] = drawing.scheduler()
    parts["depth_estimator"] = DPTForDepthEstimation(estimator)
    parts["feature_extractor"] = DPTImageProcessorPil(size={"height": 32, "width": 32})
    return StableDiffusionDepth2ImgPipeline(**parts)


def _refiner() -> Any:
    unet = drawing.unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 24, 32, 32),
        attention_head_dim=(2, 3, 4, 4),
        transformer_layers_per_block=2,
        cross_attention_dim=sdxl.SECOND_WIDTH,
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + sdxl.SECOND_WIDTH,
    )
    return StableDiffusionXLImg2ImgPipeline(
        vae=sdxl.vae(),
        text_encoder=None,
        text_encoder_2=sdxl.text_encoder_2(),
        tokenizer=None,
        tokenizer_2=sdxl.tokenizer_2(),
        unet=unet,
        scheduler=sdxl.scheduler(),
        add_watermarker=False,
    )


def flux(*, guided: bool = True, words: Any = None) -> Any:
    """A tiny Flux pipeline with random weights.

    Args:
        guided: whether it is told a guidance, as [dev] is and [schnell] is not.
        words: T5's tokenizer; None: CLIP's in its place.
    """
    table = drawing.tokenizer()
    words = words or drawing.tokenizer()
    t5 = T5Config(
        vocab_size=len(words),
        d_model=24,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
        ),
        text_encoder=drawing.text_encoder(),
        tokenizer=table,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=words,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=FLUX_WIDTH // 16,
            joint_attention_dim=24,
            pooled_projection_dim=drawing.TEXT_WIDTH,
            guidance_embeds=guided,
            axes_dims_rope=(4, 4, 8),
        ),
    )
