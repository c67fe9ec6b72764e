"""The two stages of fast-stable-diffusion's DreamBooth, and where a checkpoint enters them.

Stage 1 trains UNet and text encoder together and keeps only the text encoder; with ``text_encoder: {unet: frozen}`` the
UNet only passes gradients on. Stage 2 trains a fresh UNet of the base with that text encoder, which is frozen, so that
its embeddings are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from handlers.train import loop, sampler
from handlers.train.base import BaseModel
from handlers.train.checkpoint import Checkpoint, Tensors
from handlers.train.loop import Done, Material, Stage
from handlers.train.recorder import Recorder


class Trainer:
    """The models of one run, and what is done to them.

    Args:
        base: where fresh UNets come from.
        pipeline: VAE, text encoder, tokenizer and scheduler of the base; the text encoder is trained in place.
        material: plan, pictures and noise schedule.
        prompts: one a picture.
    """

    def __init__(self, base: BaseModel, pipeline: Any, material: Material, prompts: Sequence[str]) -> None:
        self.unet: Any = None
        self.text_encoder = pipeline.text_encoder
        self._base = base
        self._pipeline = pipeline
        self._material = material
        self._plan = material.plan
        self._device = material.device
        self._tokens = pipeline.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=pipeline.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids

    def train(self, found: Checkpoint | None, recorder: Recorder) -> None:
        """Do what is left of both stages; afterwards ``unet`` and ``text_encoder`` are the result.

        Args:
            found: where to go on; None: from the start.
            recorder: told of every step.

        Raises:
            Stopping, Cancelled: from the recorder.
            Refusal: the training diverged.
        """
        plan = self._plan
        done = found.step if found else 0
        if done < plan.text_encoder_steps:
            self._stage_1(found, recorder)
            recorder.save(plan.text_encoder_steps, 2, self._finished_parts())
            found, done = None, plan.text_encoder_steps
            recorder.stop_if_wished()
        elif found and plan.text_encoder_steps:
            self.text_encoder.load_state_dict(found.load("text_encoder"))
        self._stage_2(found if done > plan.text_encoder_steps else None, recorder)

    def _stage_1(self, found: Checkpoint | None, recorder: Recorder) -> None:
        plan = self._plan
        self.unet = self._base.load_unet()
        joint = plan.train_unet_in_stage_1
        trained = {"text_encoder": self.text_encoder, **({"unet": self.unet} if joint else {})}
        tokens = self._tokens.to(self._device)
        stage = Stage(
            1,
            f"stage 1 of 2: text encoder{' and UNet' if joint else ''}",
            0,
            plan.text_encoder_steps,
            plan.text_encoder_rate,
            self.unet,
            trained,
            lambda chosen: self.text_encoder(tokens[chosen])[0],
        )
        self._run(stage, found, lambda done: recorder.after_step(done, {}))
        self.unet = None  # only the text encoder is kept

    def _stage_2(self, found: Checkpoint | None, recorder: Recorder) -> None:
        plan = self._plan
        self.unet = self._base.load_unet()
        embeddings = self._embed_all()
        finished = self._finished_parts()
        stage = Stage(
            2,
            "stage 2 of 2: UNet" if plan.text_encoder_steps else "UNet",
            plan.text_encoder_steps,
            plan.unet_steps,
            plan.unet_rate,
            self.unet,
            {"unet": self.unet},
            lambda chosen: embeddings[chosen],
        )
        self._run(stage, found, lambda done: recorder.after_step(done, finished))

    def _run(self, stage: Stage, found: Checkpoint | None, after_step: Callable[[Done], None]) -> None:
        """Put the stage's modules on the device, in the checkpoint's state, and train."""
        for module in {id(part): part for part in (stage.unet, *stage.trained.values())}.values():
            module.requires_grad_(requires_grad=False).to(self._device)
        for name, module in stage.trained.items():
            module.requires_grad_(requires_grad=True).train()
            if found:
                module.load_state_dict(found.load(name))
        if self._device != "cpu":
            # On a GPU memory is what lacks; on a CPU it is time.
            stage.unet.enable_gradient_checkpointing()
            if "text_encoder" in stage.trained:
                self.text_encoder.gradient_checkpointing_enable()
        loop.train_stage(
            stage,
            self._material,
            found.step - stage.first if found else 0,
            found.load("optimizer") if found else None,
            after_step,
        )

    def _embed_all(self) -> torch.Tensor:
        """(pictures, tokens, width) from the finished text encoder, which leaves the device afterwards."""
        self.text_encoder.requires_grad_(requires_grad=False).eval().to(self._device)
        with torch.no_grad():
            embedded = [self.text_encoder(row[None].to(self._device))[0] for row in self._tokens]
        self.text_encoder.to("cpu")
        return torch.cat(embedded)

    def _finished_parts(self) -> dict[str, Tensors]:
        return {"text_encoder": self.text_encoder.state_dict()} if self._plan.text_encoder_steps else {}

    def draw(self, should_stop: Callable[[], bool]) -> list[Image.Image]:
        """Samples of the models as they are: each prompt with two seeds."""
        plan = self._plan
        return sampler.draw(
            self._pipeline,
            self.unet.to(self._device),
            self.text_encoder,
            wanted=[(prompt, seed) for seed in (plan.seed, plan.seed + 1) for prompt in plan.prompts],
            batch=len(plan.prompts),
            resolution=plan.resolution,
            guidance=plan.guidance,
            device=self._device,
            should_stop=should_stop,
        )
