"""Measures a training step beside another trainer's, and prints a table.

    python benchmarks/train.py                          a UNet of 35 M at 256 px on the CPU, one thread
    python benchmarks/train.py --peer PATH              beside diffusers' train_dreambooth.py at that path
    python benchmarks/train.py --device cuda:0 --shape sd15 --precision bf16

Without ``--peer`` the other side is a plain loop that does the work of diffusers' example in a step: encode the
picture, encode the prompt, predict, AdamW; it is called "plain loop" in the table. Both sides train the same fresh
UNet on the same pictures with batches of 1, in turn in one run. On the CPU it is CPU-seconds that count, so that other
work on the machine disturbs little; a GPU is timed by the clock. The limit is this machine's matrix product.
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from handlers.models.miniature import drawing
from handlers.train import dataset
from handlers.train.auto import Base, Plan, Precision, make_plan
from handlers.train.crew import Alone
from handlers.train.families import FAMILIES
from handlers.train.fitting import Fitting
from handlers.train.loop import Rate, Stage, train_stage
from handlers.train.objective import Denoising, Material
from handlers.train.optimizers import make_updates
from handlers.train.trainable import Whole
from sessions.spec import parse_spec

PICTURES = 5
# Widths of UNet and VAE, width and layers of the text encoder, pixels: SD 1.5, and a 24th of it.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], int]] = {
    "small": ((64, 128, 256, 256), (32, 64, 96, 96), (256, 5), 256),
    "sd15": ((320, 640, 1280, 1280), (128, 256, 512, 512), (768, 12), 512),
}


class Parts:
    """Fresh models of a shape, and pictures for them."""

    def __init__(self, shape: str, device: str) -> None:
        widths, vae_widths, (text_width, layers), self.resolution = SHAPES[shape]
        torch.manual_seed(7)
        self.device = device
        self.unet = UNet2DConditionModel(
            sample_size=self.resolution // 8,
            block_out_channels=widths,
            cross_attention_dim=text_width,
            attention_head_dim=8,
        )
        self.vae = AutoencoderKL(
            block_out_channels=vae_widths,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=self.resolution,
        ).requires_grad_(requires_grad=False)
        self.tokenizer = drawing.tokenizer()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=text_width,
                intermediate_size=4 * text_width,
                num_hidden_layers=layers,
                num_attention_heads=8,
            )
        ).requires_grad_(requires_grad=False)
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.images = torch.rand(PICTURES, 3, self.resolution, self.resolution) * 2 - 1
        self.prompts = ["a photo of zwx cat"] * PICTURES

    def fresh_unet(self) -> Any:
        """A copy of the same UNet, on the device."""
        return copy.deepcopy(self.unet).to(self.device)


def ours(parts: Parts, precision: Precision, steps: int) -> float:
    """Seconds a step of fastsd's second stage: latents and embeddings are cached before the clock runs."""
    spec = parse_spec("text_encoder: {steps: 0}\nsample_every: 0\ninstance: zwx\nclass: cat\nbatch_size: 1\n")
    pictures = [{"source": f"{number}.jpg"} for number in range(PICTURES)]
    plan: Plan = make_plan(spec, Base("sd15", "sd1", 512, miniature=False), pictures, "x", precision)
    vae, encoder, family = parts.vae.to(parts.device), parts.text_encoder.to(parts.device), FAMILIES["sd1"]
    with torch.no_grad():
        distribution = vae.encode(parts.images.to(parts.device)).latent_dist
        ids = family.tokens(_Tokenizer(parts), parts.prompts)["text_encoder"]
        hidden = encoder(ids.to(parts.device))[0]
    frozen = dataset.Frozen(distribution.mean.cpu().unbind(), distribution.std.cpu().unbind())
    unet = parts.fresh_unet().train()
    material = Material(plan, frozen, PICTURES, Denoising(parts.scheduler, vae.config.scaling_factor), parts.device)
    stage = Stage(
        2,
        "UNet",
        0,
        steps,
        {"unet": Rate(2e-6, steps)},
        unet,
        {"unet": Whole(unet)},
        lambda _step, chosen: {"encoder_hidden_states": hidden[chosen]},
    )
    clock = _Clock(parts.device)
    updates = make_updates(plan, stage.groups(), parts.device)
    means = replace(plan.means, checkpointing=parts.device != "cpu")
    fitting = Fitting(means, unet, (), parts.device, may_offload=False, told=print)
    train_stage(
        stage,
        material,
        0,
        updates=updates,
        fitting=fitting,
        average=None,
        crew=Alone(),
        after_step=lambda _done: clock.tick(),
    )
    return clock.middle()


class _Tokenizer:
    """What a family needs of a pipeline to find token ids."""

    def __init__(self, parts: Parts) -> None:
        self.tokenizer = parts.tokenizer


def plain(parts: Parts, precision: Precision, steps: int) -> float:
    """Seconds a step of a loop that encodes picture and prompt each time, as diffusers' example does."""
    vae, encoder = parts.vae.to(parts.device), parts.text_encoder.to(parts.device)
    unet = parts.fresh_unet().train()
    if parts.device != "cpu":
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-6)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ids = FAMILIES["sd1"].tokens(_Tokenizer(parts), parts.prompts)["text_encoder"].to(parts.device)
    clock = _Clock(parts.device)
    for step in range(steps):
        index = step % PICTURES
        with torch.autocast(parts.device.partition(":")[0], dtype=dtype, enabled=precision != "fp32"):
            pixels = parts.images[index : index + 1].to(parts.device)
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, parts.scheduler.config.num_train_timesteps, (1,), device=parts.device)
            noisy = parts.scheduler.add_noise(latents, noise, timesteps)
            hidden = encoder(ids[index : index + 1])[0]
            predicted = unet(noisy, timesteps, hidden).sample
            loss = functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        clock.tick()
    return clock.middle()


class _Clock:
    """Seconds between ticks: of CPU where the CPU computes, else of the clock."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._at = [self._now()]

    def _now(self) -> float:
        if self._device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def tick(self) -> None:
        """A step is done."""
        self._at.append(self._now())

    def middle(self) -> float:
        """The median step, without the first two, in which memory is found."""
        durations = [after - before for before, after in zip(self._at, self._at[1:], strict=False)]
        return median(durations[2:] or durations)


def peer(path: Path, parts: Parts, steps: int) -> float:
    """CPU-seconds a step of diffusers' train_dreambooth.py: many steps less a few, so that loading drops out."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        StableDiffusionPipeline(
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            unet=parts.unet,
            scheduler=parts.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder / "base")
        (folder / "pictures").mkdir()
        for number, image in enumerate(parts.images):
            pixels = ((image / 2 + 0.5) * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")

        def seconds(count: int) -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            names = ["pretrained_model_name_or_path", "instance_data_dir", "output_dir"]
            places = [folder / "base", folder / "pictures", folder / f"out{count}"]
            arguments = [f"--{name}={place}" for name, place in zip(names, places, strict=True)]
            arguments += [f"--max_train_steps={count}", f"--resolution={parts.resolution}", "--train_batch_size=1"]
            arguments += ["--instance_prompt=a photo of zwx cat", "--learning_rate=2e-6"]
            subprocess.run([sys.executable, str(path), *arguments], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        return (seconds(2 + steps) - seconds(2)) / steps


def flops_of_a_step(parts: Parts) -> float:
    """Of the UNet, forward and backward, for one picture."""
    unet = parts.fresh_unet()
    side = parts.resolution // 8
    latents = torch.randn(1, 4, side, side, device=parts.device)
    hidden = torch.randn(1, 77, unet.config.cross_attention_dim, device=parts.device)
    with FlopCounterMode(display=False) as counter:
        unet(latents, torch.tensor([500], device=parts.device), hidden).sample.mean().backward()
    return float(counter.get_total_flops())


def flops_a_second(device: str, precision: Precision) -> float:
    """Of a matrix product: what the hardware gives."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side = 1024 if device == "cpu" else 8192
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    clock = _Clock(device)
    for _ in range(12):
        left @ right
        clock.tick()
    return 2 * side**3 / clock.middle()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a training step beside another trainer's.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of both in turn; the medians are shown")
    parser.add_argument("--peer", type=Path, help="diffusers' examples/dreambooth/train_dreambooth.py")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    parts = Parts(options.shape, options.device)
    sides: dict[str, Callable[[], float]] = {
        "fastsd": lambda: ours(parts, options.precision, options.steps),
        "plain loop": lambda: plain(parts, options.precision, options.steps),
    }
    if options.peer:
        sides["train_dreambooth.py"] = lambda: peer(options.peer, parts, options.steps)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}
    for turn in range(options.rounds):
        for name, measure in sides.items():
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            taken[name].append(measure())
            if options.device != "cpu":
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
            print(f"round {turn + 1}: {name}: {taken[name][-1]:.3f} s a step", flush=True)
    count = sum(parameter.numel() for parameter in parts.unet.parameters())
    reached = flops_of_a_step(parts) / median(taken["fastsd"]) / flops_a_second(options.device, options.precision)
    print(f"\nUNet of {count / 1e6:.0f} M at {parts.resolution} px, {options.precision}, {options.device}")
    print(f"{'':<22}{'s/step':>8}{'times':>8}{'peak GB':>9}")
    for name, durations in taken.items():
        ratio = median(durations) / median(taken["fastsd"])
        print(f"{name:<22}{median(durations):>8.3f}{ratio:>8.2f}{peaks.get(name, float('nan')):>9.2f}")
    print(f"fastsd reaches {reached:.0%} of what a matrix product reaches here")


if __name__ == "__main__":
    main()
