"""Measures a training step beside another trainer's, and prints a table.

    python benchmarks/train.py                          a UNet of 35 M at 256 px on the CPU, one thread
    python benchmarks/train.py --peer PATH              beside diffusers' train_dreambooth.py at that path
    python benchmarks/train.py --device cuda:0 --shape sd15 --precision bf16
    python benchmarks/train.py --device cuda:0 --shape sdxl-lora --precision bf16
    python benchmarks/train.py --device cuda:0 --shape sd15 --precision bf16 --presets    peak memory of each preset

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from handlers.models.miniature import drawing
from handlers.train import dataset
from handlers.train.auto import Base, make_plan
from handlers.train.crew import Alone
from handlers.train.families import FAMILIES
from handlers.train.fitting import Fitting
from handlers.train.loop import Rate, Stage, train_stage
from handlers.train.memory import Load, Means, bytes_named, choose
from handlers.train.objective import Denoising, Material
from handlers.train.optimizers import Groups, make_updates, usable_optimizers
from handlers.train.plan import Plan, Precision
from handlers.train.trainable import Adapter, Trainable, Whole, adapted, layers_of
from sessions.spec import parse_spec

PICTURES = 5


@dataclass(frozen=True)
class Shape:
    """The sizes of a family's models.

    Attributes:
        family: sd1 or sdxl.
        unet: diffusers' configuration.
        vae: widths of its blocks.
        encoders: width, layers, heads of each text encoder.
        resolution: pixels of a side.
        adapter: whether a LoRA of rank 16 is trained, else all of the UNet.
    """

    family: str
    unet: Mapping[str, Any]
    vae: tuple[int, ...]
    encoders: tuple[tuple[int, int, int], ...]
    resolution: int
    adapter: bool = False


def _sd(widths: tuple[int, ...], cross: int) -> dict[str, Any]:
    return {"block_out_channels": widths, "cross_attention_dim": cross, "attention_head_dim": 8}


def _sdxl(widths: tuple[int, ...], cross: int, pooled: int, depths: tuple[int, ...]) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "cross_attention_dim": cross,
        "attention_head_dim": tuple(width // 64 for width in widths),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": depths,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": pooled + 6 * 256,
    }


# SD 1.5 and SDXL, and a 24th and a 60th of them.
SHAPES: dict[str, Shape] = {
    "small": Shape("sd1", _sd((64, 128, 256, 256), 256), (32, 64, 96, 96), ((256, 5, 8),), 256),
    "sd15": Shape("sd1", _sd((320, 640, 1280, 1280), 768), (128, 256, 512, 512), ((768, 12, 8),), 512),
    "small-sdxl-lora": Shape(
        "sdxl",
        _sdxl((64, 128, 256), 512, 320, (1, 1, 2)),
        (32, 64, 96, 96),
        ((192, 4, 4), (320, 5, 4)),
        256,
        adapter=True,
    ),
    "sdxl-lora": Shape(
        "sdxl",
        _sdxl((320, 640, 1280), 2048, 1280, (1, 2, 10)),
        (128, 256, 512, 512),
        ((768, 12, 12), (1280, 32, 20)),
        1024,
        adapter=True,
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANK = 16


class Parts:
    """Fresh models of a shape, and pictures for them: what a family needs of a pipeline."""

    text_encoder: Any
    text_encoder_2: Any

    def __init__(self, name: str, device: str) -> None:
        self.shape = SHAPES[name]
        self.resolution = self.shape.resolution
        self.family = FAMILIES[self.shape.family]
        torch.manual_seed(7)
        self.device = device
        self.unet = UNet2DConditionModel(sample_size=self.resolution // 8, **self.shape.unet)
        self.vae = AutoencoderKL(
            block_out_channels=self.shape.vae,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=self.resolution,
        ).requires_grad_(requires_grad=False)
        self.tokenizer = self.tokenizer_2 = drawing.tokenizer()
        self.config = SimpleNamespace(force_zeros_for_empty_prompt=True)  # SDXL's
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        for kind, attribute, sizes in zip(kinds, self.family.encoders, self.shape.encoders, strict=False):
            setattr(self, attribute, self._encoder(kind, *sizes))
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.images = torch.rand(PICTURES, 3, self.resolution, self.resolution) * 2 - 1
        self.prompts = ["a photo of zwx cat"] * PICTURES
        side = float(self.resolution)
        self.sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]] * PICTURES)

    def _encoder(self, kind: Any, width: int, layers: int, heads: int) -> Any:
        configuration = CLIPTextConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
        )
        return kind(configuration).requires_grad_(requires_grad=False)

    def fresh_unet(self) -> Any:
        """A copy of the same UNet, on the device."""
        return copy.deepcopy(self.unet).to(self.device)

    def to_device(self) -> None:
        """VAE and text encoders go where it is computed."""
        for name in ("vae", *self.family.encoders):
            getattr(self, name).to(self.device)

    def condition(self, chosen: Sequence[int]) -> dict[str, Any]:
        """What the UNet is told of pictures, computed anew."""
        tokens = {
            name: ids.to(self.device)
            for name, ids in self.family.tokens(self, [self.prompts[index] for index in chosen]).items()
        }
        return self.family.condition(self.family.embed(self, tokens), self.sizes[list(chosen)])


def ours(parts: Parts, precision: Precision, steps: int, memory: str) -> float:
    """Seconds a step of fastsd's second stage: latents and embeddings are cached before the clock runs.

    Args:
        parts: the models.
        precision: to compute in.
        steps: how many.
        memory: a preset of train.yaml, or auto: gradient checkpointing on a GPU.
    """
    method = "lora" if parts.shape.adapter else "dreambooth"
    spec = parse_spec(
        f"method: {method}\ntext_encoder: {{steps: 0}}\nsample_every: 0\ninstance: zwx\nclass: cat\nbatch_size: 1\n"
    )
    pictures = [{"source": f"{number}.jpg"} for number in range(PICTURES)]
    name = "sdxl" if parts.shape.family == "sdxl" else "sd15"
    plan: Plan = make_plan(spec, Base(name, parts.shape.family, 512, miniature=False), pictures, "x", precision)
    parts.to_device()
    with torch.no_grad():
        means, deviations = [], []
        for image in parts.images:
            distribution = parts.vae.encode(image[None].to(parts.device)).latent_dist
            means.append(distribution.mean[0].cpu())
            deviations.append(distribution.std[0].cpu())
        told = [parts.condition([index]) for index in range(PICTURES)]
    for module in (parts.vae, *(getattr(parts, name) for name in parts.family.encoders)):
        module.to("cpu")
    unet = parts.fresh_unet().train()
    trained: Trainable = _adapter(unet, precision) if parts.shape.adapter else Whole(unet)
    objective = Denoising(parts.scheduler, parts.vae.config.scaling_factor)
    material = Material(plan, dataset.Frozen(means, deviations), PICTURES, objective, parts.device)
    stage = Stage(
        2, "UNet", 0, steps, {"unet": Rate(2e-6, steps)}, unet, {"unet": trained}, lambda _step, chosen: told[chosen[0]]
    )
    clock = _Clock(parts.device)
    groups = stage.groups
    means_of_memory = _means(parts, plan, groups, memory)
    plan = plan.with_means(means_of_memory)
    fitting = Fitting(means_of_memory, unet, (), parts.device, may_offload=parts.shape.adapter, told=print)
    train_stage(
        stage,
        replace(material, plan=plan),
        0,
        updates=make_updates(plan, groups, parts.device),
        fitting=fitting,
        average=None,
        crew=Alone(),
        after_step=lambda _done: clock.tick(),
    )
    return clock.middle()


def _adapter(unet: Any, precision: Precision) -> Adapter:
    unet.to(dtype=DTYPES[precision])
    return adapted(unet, layers_of("unet", convolutions=False), rank=RANK, alpha=RANK, dora=False, seed=1)


def _means(parts: Parts, plan: Plan, groups: Groups, memory: str) -> Means:
    if memory == "auto":
        return replace(plan.means, checkpointing=parts.device != "cpu")
    trained = sum(parameter.numel() for group in groups.values() for parameter in group.values())
    denoiser = sum(parameter.numel() for parameter in parts.unet.parameters())
    load = Load(
        family=parts.shape.family,
        trained=trained,
        frozen=denoiser if parts.shape.adapter else 0,
        denoiser=denoiser,
        resolution=parts.resolution,
        pictures=1,
        half=plan.precision != "fp32",
        adapter=parts.shape.adapter,
    )
    means = choose(load, None, usable_optimizers(), bytes_named(memory))
    if means is None:
        sys.exit(f"nothing fits into memory: {memory}")
    print(f"memory: {memory}: {means.told()}", flush=True)
    return means


def plain(parts: Parts, precision: Precision, steps: int) -> float:
    """Seconds a step of a loop that encodes the picture each time, as diffusers' examples do.

    For all of a UNet the prompt is encoded each time, too; the example of SDXL's LoRA does that once.
    """
    parts.to_device()
    unet = parts.fresh_unet().train()
    if parts.shape.adapter:
        parameters = list(_adapter(unet, precision).parameters().values())
    else:
        parameters = list(unet.parameters())
    if parts.device != "cpu":
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=2e-6)
    with torch.no_grad():
        once = [parts.condition([index]) for index in range(PICTURES)] if parts.shape.adapter else []
    clock = _Clock(parts.device)
    for step in range(steps):
        index = step % PICTURES
        with torch.no_grad():
            pixels = parts.images[index : index + 1].to(parts.device)
            latents = parts.vae.encode(pixels).latent_dist.sample() * parts.vae.config.scaling_factor
        with torch.autocast(parts.device.partition(":")[0], dtype=DTYPES[precision], enabled=precision != "fp32"):
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, parts.scheduler.config.num_train_timesteps, (1,), device=parts.device)
            noisy = parts.scheduler.add_noise(latents, noise, timesteps)
            told = once[index] if once else parts.condition([index])
            loss = functional.mse_loss(unet(noisy, timesteps, **told).sample.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
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
    """Of the UNet, forward and backward, for one picture; an adapter needs no gradients of the weights below it."""
    unet = parts.fresh_unet().train()
    if parts.shape.adapter:
        _adapter(unet, "fp32").parameters()
    parts.to_device()
    side = parts.resolution // 8
    latents = torch.randn(1, 4, side, side, device=parts.device)
    with torch.no_grad():
        told = parts.condition([0])
    with FlopCounterMode(display=False) as counter:
        unet(latents, torch.tensor([500], device=parts.device), **told).sample.mean().backward()
    return float(counter.get_total_flops())


def flops_a_second(device: str, precision: Precision) -> float:
    """Of a matrix product: what the hardware gives."""
    dtype = DTYPES[precision]
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
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="of both in turn; medians are shown, of ratios too",
    )
    parser.add_argument("--peer", type=Path, help="diffusers' examples/dreambooth/train_dreambooth.py")
    parser.add_argument("--presets", action="store_true", help="instead: fastsd alone with each memory preset")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    parts = Parts(options.shape, options.device)
    sides: dict[str, Callable[[], float]] = {
        "fastsd": lambda: ours(parts, options.precision, options.steps, "auto"),
        "plain loop": lambda: plain(parts, options.precision, options.steps),
    }
    if options.presets:
        sides = {
            size: partial(ours, parts, options.precision, options.steps, size)
            for size in ("8GB", "12GB", "16GB", "24GB", "48GB")
        }
    elif options.peer:
        sides["train_dreambooth.py"] = lambda: peer(options.peer, parts, options.steps)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float] = {}
    for turn in range(options.rounds):
        for name, measure in sides.items():
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            taken[name].append(measure())
            if options.device != "cpu":
                peaks[name] = max(peaks.get(name, 0.0), torch.cuda.max_memory_allocated() / 1e9)
            print(f"round {turn + 1}: {name}: {taken[name][-1]:.3f} s a step", flush=True)
    count = sum(parameter.numel() for parameter in parts.unet.parameters())
    first = min(taken, key=lambda name: median(taken[name])) if options.presets else "fastsd"
    fastest = median(taken[first])
    reached = flops_of_a_step(parts) / fastest / flops_a_second(options.device, options.precision)
    print(f"\nUNet of {count / 1e6:.0f} M at {parts.resolution} px, {options.precision}, {options.device}")
    print(f"{'':<22}{'s/step':>8}{'times':>8}{'peak GB':>9}")
    for name, durations in taken.items():
        # By round: what else the machine does changes from one to the next, and both sides of one feel it.
        ratio = median(other / own for other, own in zip(durations, taken[first], strict=True))
        print(f"{name:<22}{median(durations):>8.3f}{ratio:>8.2f}{peaks.get(name, float('nan')):>9.2f}")
    print(f"fastsd reaches {reached:.0%} of what a matrix product reaches here")


if __name__ == "__main__":
    main()
