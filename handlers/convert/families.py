"""The families that can be converted: their tables, and what programs call them.

Adding a family means adding its table and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from handlers.convert import flux, sd1, sd2, sdxl
from handlers.convert.keymap import Component


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: sd1, sd2, sdxl or flux, as everywhere; the refiner is a family here, since it has a table of its own.
        components: its tables.
        architecture: modelspec's name of it.
        implementation: modelspec's address of the code that defines the single file's layout.
        filler: the registry's name of the base that lends missing parts.
    """

    name: str
    components: tuple[Component, ...]
    architecture: str
    implementation: str
    filler: str

    @property
    def drawing(self) -> Component:
        """The component that draws: UNet or transformer."""
        return next(part for part in self.components if part.name in ("unet", "transformer"))


_LDM = "https://github.com/CompVis/stable-diffusion"
_SGM = "https://github.com/Stability-AI/generative-models"

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("sd1", sd1.COMPONENTS, "stable-diffusion-v1", _LDM, "sd15"),
        Family(
            "sd2",
            sd2.COMPONENTS,
            "stable-diffusion-v2",
            "https://github.com/Stability-AI/stablediffusion",
            "sd21",
        ),
        Family("sdxl", sdxl.BASE, "stable-diffusion-xl-v1-base", _SGM, "sdxl"),
        Family(
            "sdxl-refiner",
            sdxl.REFINER,
            "stable-diffusion-xl-v1-refiner",
            _SGM,
            "sdxl-refiner",
        ),
        Family(
            "flux",
            flux.COMPONENTS,
            "Flux.1-dev",
            "https://github.com/black-forest-labs/flux",
            "flux-dev",
        ),
    )
}
# What a single file of any of these families may carry besides its tensors: the training's schedule, its averaged copy
# of the weights, another model that programs fetch themselves, and the marks of v-prediction.
# SD 2's depth files carry MiDaS, which a Diffusers folder has as its depth_estimator under other names.
BUFFERS = (
    "depth_model.",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "cond_stage_model.logit_scale",
    "denoiser.sigmas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_",
    "scale_factor",
    "sqrt_",
)
AVERAGES = "model_ema."
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
# Schedules that the tables of these families do not describe.
FOREIGN = ("edm_mean", "edm_vpred.sigma_max")
