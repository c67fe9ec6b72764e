"""The two stages of fast-stable-diffusion's DreamBooth, and where a checkpoint enters them.

What predicts is called the denoiser: a UNet, or Flux's transformer. Stage 1 trains it and the text encoders together
and keeps only the text encoders; with ``text_encoder: {unet: frozen}`` the denoiser only passes gradients on. Stage 2
trains a fresh denoiser of the base with those text encoders, which are frozen, so that their embeddings are computed
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from handlers.train import loop, randomness, sampler
from handlers.train.average import Average
from handlers.train.base import BaseModel
from handlers.train.checkpoint import Checkpoint, Tensors
from handlers.train.conditions import Conditions
from handlers.train.crew import Crew
from handlers.train.families.interface import Embedded
from handlers.train.fitting import Fitting
from handlers.train.fresh import DTYPES, fresh_denoiser
from handlers.train.loop import Done, Rate, Stage
from handlers.train.objective import Material
from handlers.train.optimizers import make_updates
from handlers.train.recorder import Notes
from handlers.train.teacher import Teacher, beneath, beside
from handlers.train.trainable import Adapter, Trainable, Whole, adapted, adapted_layers
from handlers.train.wording import Wording

_TITLES = {"finetune": "fine-tuning", "lora": "LoRA", "dora": "DoRA"}


class Trainer:
    """The models of one run, and what is done to them.

    Args:
        base: where fresh denoisers come from.
        pipeline: VAE, text encoders, tokenizers and scheduler of the base; text encoders are trained in place.
        material: plan, pictures and noise schedule.
        words: what the pictures are told.
        sizes: of each picture, (pictures, 6), as ``interface.Family.condition`` takes them.
        start: component → tensors of the adapter that a run without a checkpoint goes on from; empty: a fresh one.
        crew: those who share the steps.
        told: told in a line of what people may want to know.
    """

    def __init__(
        self,
        base: BaseModel,
        pipeline: Any,
        material: Material,
        words: Wording,
        sizes: torch.Tensor,
        *,
        start: Mapping[str, Tensors],
        crew: Crew,
        told: Callable[[str], None],
    ) -> None:
        self.denoiser: Any = None
        self._stage: Stage | None = None
        self._average: Average | None = None
        self._start = start
        self._crew = crew
        self._told = told
        self.adapters: dict[str, Adapter] = {}
        self._family = base.training
        self._base = base
        self._pipeline = pipeline
        self._material = material
        self._plan = material.plan
        self._device = material.device
        self._conditions = Conditions(
            self._family, pipeline, words, sizes, drawn=self._plan.prompts, device=self._device, told=told
        )
        self._said_before: Embedded | None = None

    def train(self, found: Checkpoint | None, recorder: Notes) -> None:
        """Do what is left; then ``denoiser`` and the pipeline's text encoders are the result, or ``adapters``.

        Args:
            found: where to go on; None: from the start.
            recorder: told of every step.

        Raises:
            Stopping, Cancelled: from the recorder.
            Refusal: the training diverged.
        """
        plan = self._plan
        self._said_before = self._speak_before(found)
        if plan.is_one_stage:
            self._together(found, recorder)
            return
        done = found.step if found else 0
        if done < plan.text_encoder_steps:
            self._stage_1(found, recorder)
            recorder.save(plan.text_encoder_steps, 2, self._finished_parts())
            found, done = None, plan.text_encoder_steps
            recorder.stop_if_wished()
        elif found and plan.text_encoder_steps:
            for name, encoder in self._conditions.encoders.items():
                encoder.load_state_dict(found.load(name))
        self._stage_2(found if done > plan.text_encoder_steps else None, recorder)

    def _stage_1(self, found: Checkpoint | None, recorder: Notes) -> None:
        plan = self._plan
        self.denoiser = self._base.load_denoiser()
        joint = plan.train_unet_in_stage_1
        modules = {**self._conditions.encoders, **({self._family.denoiser: self.denoiser} if joint else {})}
        trained = {name: Whole(module) for name, module in modules.items()}
        stage = Stage(
            1,
            f"stage 1 of 2: text encoder{' and UNet' if joint else ''}",
            0,
            plan.text_encoder_steps,
            dict.fromkeys(trained, Rate(plan.text_encoder_rate, plan.text_encoder_steps)),
            self.denoiser,
            trained,
            lambda step, chosen: self._conditions.anew(1, step, chosen),
            self._teacher(1, None),
        )
        self._run(stage, found, lambda done: recorder.after_step(done, {}))
        self.denoiser = None  # only the text encoder is kept

    def _stage_2(self, found: Checkpoint | None, recorder: Notes) -> None:
        plan = self._plan
        embedded = self._conditions.for_good()
        self.denoiser = self._base.load_denoiser()
        finished = self._finished_parts()
        stage = Stage(
            2,
            "stage 2 of 2: UNet" if plan.text_encoder_steps else "UNet",
            plan.text_encoder_steps,
            plan.unet_steps,
            {self._family.denoiser: Rate(plan.unet_rate, plan.unet_steps)},
            self.denoiser,
            {self._family.denoiser: Whole(self.denoiser)},
            lambda step, chosen: self._conditions.of(2, embedded, step, chosen),
            self._teacher(2, embedded),
        )
        self._run(stage, found, lambda done: recorder.after_step(done, finished))

    def _together(self, found: Checkpoint | None, recorder: Notes) -> None:
        """One stage: the denoiser, and the text encoders for as many steps as they have; whole, or adapters in them."""
        plan = self._plan
        # Text encoders that stay as they are speak before the denoiser takes their place.
        encoders = self._conditions.encoders if self._changes_encoders(found) else {}
        embedded = None if encoders else self._conditions.for_good()
        self.denoiser = fresh_denoiser(self._base, plan, self._device)
        modules = {self._family.denoiser: self.denoiser, **encoders}
        trained: dict[str, Trainable] = {name: self._trainable(name, module) for name, module in modules.items()}
        encoder_rate = Rate(plan.text_encoder_rate, min(plan.text_encoder_steps, plan.unet_steps))
        unet_rate = Rate(plan.unet_rate, plan.unet_steps)
        drawing = "UNet" if self._family.denoiser == "unet" else self._family.denoiser
        stage = Stage(
            2,
            f"{_TITLES[plan.method]}: {drawing}{' and text encoder' if plan.text_encoder_steps else ''}",
            0,
            plan.unet_steps,
            {name: unet_rate if name == self._family.denoiser else encoder_rate for name in modules},
            self.denoiser,
            trained,
            lambda step, chosen: (
                self._conditions.anew(2, step, chosen)
                if embedded is None
                else self._conditions.of(2, embedded, step, chosen)
            ),
            self._teacher(2, embedded),
        )
        self.adapters = {name: each for name, each in trained.items() if isinstance(each, Adapter)}
        self._run(stage, found, lambda done: recorder.after_step(done, {}))

    def _changes_encoders(self, found: Checkpoint | None) -> bool:
        """Whether text encoders are trained, or keep the adapter that they had."""
        known = [found.has(name) if found else name in self._start for name in self._conditions.encoders]
        return bool(self._plan.text_encoder_steps) or any(known)

    def _trainable(self, name: str, module: Any) -> Trainable:
        plan = self._plan
        if not plan.is_adapter:
            return Whole(module)
        if name in self._conditions.encoders:
            module.to(dtype=DTYPES[plan.precision])
        adapter = adapted(
            module,
            adapted_layers(plan, [name])[name],
            rank=plan.lora_rank,
            alpha=plan.lora_alpha,
            dora=plan.method == "dora",
            seed=randomness.number(plan.seed, 2, 0, f"adapter of {name}"),
        )
        if name in self._start:
            adapter.begin(self._start[name])
        return adapter

    def _run(self, stage: Stage, found: Checkpoint | None, after_step: Callable[[Done], None]) -> None:
        """Put the stage's modules on the device, in the checkpoint's state, and train."""
        plan = self._plan
        self._stage = stage
        parts = [stage.denoiser, *(trained.module for trained in stage.trained.values())]
        modules = list({id(part): part for part in parts}.values())
        for module in modules:
            module.requires_grad_(requires_grad=False)
        groups = stage.groups  # what is trained is not frozen from now on
        # What stays in the CPU's memory is put away before the rest moves.
        fitting = Fitting(
            plan.means,
            stage.denoiser,
            [self._conditions.encoders[name] for name in self._conditions.encoders if name in stage.trained],
            self._device,
            may_offload=plan.is_adapter,
            told=self._told,
        )
        for module in modules:
            module.to(self._device)
        for name, trained in stage.trained.items():
            trained.module.train()
            if found:
                trained.load(found.load(name))
        self._quicken(stage.denoiser)
        updates = make_updates(plan, groups, self._device)
        self._average = Average(groups) if plan.ema else None
        if found:
            updates.restore(found.load("optimizer"))
            if self._average:
                self._average.restore(found.load("average"))
        start = found.step - stage.first if found else 0
        loop.train_stage(
            stage,
            self._material,
            start,
            updates=updates,
            fitting=fitting,
            average=self._average,
            crew=self._crew,
            after_step=after_step,
        )
        self._average = None  # it has taken the parameters' place
        self._stage = None

    def _quicken(self, denoiser: Any) -> None:
        """What makes steps faster and leaves results as they are, but for rounding."""
        if self._device.startswith("cuda") and isinstance(denoiser, UNet2DConditionModel):
            # A convolution on tensor cores wants its channels side by side.
            denoiser.to(memory_format=torch.channels_last)
        if self._plan.compile and self._plan.offload:
            self._told("compile: false, since the blocks of the base come and go")
        elif self._plan.compile:
            # What cannot be compiled runs as it is: an hour of training is not lost over it.
            torch._dynamo.config.suppress_errors = True  # noqa: SLF001 - its documented place
            denoiser.compile_repeated_blocks()

    def recall(self, found: Checkpoint) -> None:
        """Put the models of the stage that was interrupted back to what they were at one of its checkpoints."""
        if self._stage is None:
            message = "nothing was trained yet"
            raise RuntimeError(message)
        for name, trained in self._stage.trained.items():
            trained.load(found.load(name))
        if self._average:
            self._average.restore(found.load("average"))

    @contextmanager
    def result(self) -> Iterator[None]:
        """The modules are what they would be if the run ended now: the moving average where there is one."""
        if self._average is None:
            yield
            return
        with self._average.shown():
            yield

    def _speak_before(self, found: Checkpoint | None) -> Embedded | None:
        """All prompts, from the base's text encoders; None where nobody asks for them, or they stay as they are."""
        if not self._plan.has_teacher or not self._changes_encoders(found):
            return None
        return self._conditions.now()

    def _teacher(self, stage: int, embedded: Embedded | None) -> Teacher | None:
        """What class pictures are kept to in a stage, told what the base's text encoders said before they were trained.

        Args:
            stage: its number.
            embedded: what they say now, where they are not trained.
        """
        before = self._said_before or embedded
        if not self._plan.has_teacher or before is None:
            return None
        denoiser, as_before = (
            beneath(self.denoiser) if self._plan.is_adapter else beside(self._base, self._plan, self._device)
        )
        return Teacher(denoiser, as_before, lambda step, chosen: self._conditions.of(stage, before, step, chosen))

    def _finished_parts(self) -> dict[str, Tensors]:
        if not self._plan.text_encoder_steps:
            return {}
        return {name: encoder.state_dict() for name, encoder in self._conditions.encoders.items()}

    def draw(self, should_stop: Callable[[], bool]) -> list[Image.Image]:
        """Samples of the models as they are: each prompt with two seeds."""
        plan = self._plan
        with self.result():
            return sampler.draw(
                self._family,
                self._pipeline,
                self.denoiser.to(self._device),
                wanted=[(prompt, seed) for seed in (plan.seed, plan.seed + 1) for prompt in plan.prompts],
                embedded=self._conditions.spoken,
                batch=len(plan.prompts),
                resolution=plan.resolution,
                guidance=plan.guidance,
                device=self._device,
                should_stop=should_stop,
            )
