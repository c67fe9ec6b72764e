"""Write trained states as the folders that the package ships: ``python -m tools.miniature.export --state DIR``.

Weights are float16; ``miniature.ensure`` unfolds these folders from then on. A family whose states are missing is left.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from handlers.models import miniature
from handlers.models.miniature import captioner, drawing, sd2, sdxl, searcher
from tools.miniature import latents, pool, train_captioner, training


def drawing_family(state: Path, target: Path) -> None:
    """VAE (standardised as in training), text encoder and UNet as a Diffusers folder."""
    text_encoder = drawing.text_encoder()
    if (state / "text.pt").is_file():
        text_encoder.load_state_dict(_text_weights(state / "text.pt"))
    else:
        training.load_shipped(text_encoder, "miniature", "text_encoder")
    vae = drawing.vae()
    training.load_mean(state / "vae.pt", [vae])
    standardised(vae)
    unet = _unet(state / "unet.pt", drawing.unet())
    made = drawing.pipeline(vae=vae, text_encoder=text_encoder, unet=unet)
    _replace(target, lambda: drawing.save(made, target, torch.float16))


def second_family(state: Path, target: Path) -> None:
    """The UNet in the structure of SD 2; what ``expand.borrow`` takes from the first family is left out."""
    made = sd2.pipeline(unet=_unet(state / "unet-sd2.pt", sd2.unet()))
    _replace(target, lambda: drawing.save(made, target, torch.float16))
    _leave_to_lender(target)


def third_family(state: Path, target: Path) -> None:
    """The UNet and the second text encoder in the structure of SDXL; the rest is the first family's."""
    second = sdxl.text_encoder_2()
    if (state / "text-2.pt").is_file():
        second.load_state_dict(_text_weights(state / "text-2.pt"))
    else:
        training.load_shipped(second, "miniature-sdxl", "text_encoder_2")
    made = sdxl.pipeline(unet=_unet(state / "unet-sdxl.pt", sdxl.unet()), text_encoder_2=second)
    _replace(target, lambda: sdxl.save(made, target, torch.float16))
    _leave_to_lender(target)


def _replace(target: Path, save: Callable[[], None]) -> None:
    """Save where an older folder may lie; what is saved may have been read from it."""
    shutil.rmtree(target, ignore_errors=True)
    save()


def _leave_to_lender(target: Path) -> None:
    """Remove what is the first family's: tokenizer, and the weights of its text encoder and VAE."""
    shutil.rmtree(target / "tokenizer")
    for part in ("vae", "text_encoder"):
        (target / part / training.WEIGHTS_OF[part]).unlink()


def _unet(state: Path, unet: UNet2DConditionModel) -> UNet2DConditionModel:
    about = training.load_mean(state, [unet])
    print(f"{state.stem}: {about['step']} steps, {about['minutes']:.0f} minutes")
    return unet


def _text_weights(state: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(state, weights_only=True)["mean"]
    return {key[2:]: value for key, value in saved.items() if key.startswith("0.")}


def standardised(vae: AutoencoderKL) -> None:
    """Give the VAE the spread of latents that train_drawing gave it: from the same pictures."""
    from tools.miniature.train_drawing import NAMELESS, PICTURES

    latents.standardise(vae, latents.encode(vae, pool.drawn(PICTURES, pool.TRAINING_SEED + 1, nameless=NAMELESS)))


def captioning_family(state: Path, target: Path) -> None:
    """The captioner as a transformers folder; its eyes' heads are thrown away."""
    tools = captioner.processor()
    model = captioner.model(len(tools.tokenizer))
    eyes = train_captioner.Eyes(model.config.text_config.embed_dim)
    about = training.load_mean(state / "captioner.pt", [model, eyes])
    _replace(target, lambda: captioner.save(model, tools, target, torch.float16))
    print(f"{target.name}: {about['step']} steps, {about['minutes']:.0f} minutes")


def searching_family(state: Path, target: Path) -> None:
    """The search model as a transformers folder; its eyes' heads are thrown away."""
    model = searcher.model()
    eyes = train_captioner.Eyes(model.config.vision_config.hidden_size)
    about = training.load_mean(state / "search.pt", [model, eyes])
    _replace(target, lambda: searcher.save(model, searcher.processor(), target, torch.float16))
    print(f"{target.name}: {about['step']} steps, {about['minutes']:.0f} minutes")


def _finish(folder: Path) -> None:
    """Let the configurations name the type that the weights have once they are unfolded, and everybody read them."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in folder.rglob("config.json"):
        configuration = path.read_text(encoding="utf-8")
        path.write_text(configuration.replace('"dtype": "float16"', '"dtype": "float32"'), encoding="utf-8")


FAMILIES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "miniature": ("unet.pt", drawing_family),
    "miniature-sd2": ("unet-sd2.pt", second_family),
    "miniature-sdxl": ("unet-sdxl.pt", third_family),
    "miniature-captioner": ("captioner.pt", captioning_family),
    "miniature-search": ("search.pt", searching_family),
}


def main() -> None:
    """Write every family whose last state is there."""
    parser = argparse.ArgumentParser(description="Write trained miniatures as the package ships them.")
    parser.add_argument("--state", type=Path, required=True, help="folder of states")
    parser.add_argument("--target", type=Path, default=miniature.WEIGHTS, help="folder to write (the package's)")
    parser.add_argument("--only", choices=sorted(FAMILIES), help="this family alone")
    options = parser.parse_args()
    for name, (last, write) in FAMILIES.items():
        if options.only in {None, name} and (options.state / last).is_file():
            folder = options.target / name
            write(options.state, folder)
            _finish(folder)


if __name__ == "__main__":
    main()
