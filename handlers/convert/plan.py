"""From a Diffusers folder to the list of tensors of one file, in the order in which they are copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from handlers.convert.header import SIZES
from handlers.convert.keymap import Component
from handlers.convert.source import Located, Pipeline
from sessions.refusal import Refusal

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Entry:
    """One tensor of the output.

    Attributes:
        name: its key in the single file.
        dtype: its type there.
        shape: its shape there.
        component: the component that it comes from.
        key: its key there.
        source: where its bytes lie, and in which type.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    component: str
    key: str
    source: Located

    @property
    def length(self) -> int:
        """Bytes in the output."""
        return prod(self.shape) * SIZES[self.dtype]


def make_plan(
    components: Sequence[Component], found: Mapping[str, Mapping[str, Located]], dtype: str | None
) -> list[Entry]:
    """Every tensor of the single file, ordered so that each source file is read once from start to end.

    Args:
        components: the family's table.
        found: component → its tensors.
        dtype: F32, F16 or BF16 for all floating tensors; None keeps each.

    Raises:
        Refusal: code ``source``: a key that the table does not know, or two that would become one.
    """
    plan: dict[str, Entry] = {}
    for component in components:
        tensors = found[component.name]
        for key, located in sorted(tensors.items(), key=lambda item: (str(item[1].file), item[1].tensor.begin)):
            if component.is_ignored(key):
                continue
            name = component.to_single(key)
            if name is None or name in plan:
                why = "is not known" if name is None else "stands there twice"
                raise Refusal(
                    "source",
                    f"The tensor {component.name}/{key} {why} in an SD 1 model.",
                    "Is it a model of another family?",
                )
            kind = located.tensor.dtype
            wanted = dtype if dtype is not None and kind in FLOATS else kind
            shape = component.shape_in_single(name, located.tensor.shape)
            plan[name] = Entry(name, wanted, shape, component.name, key, located)
    return list(plan.values())


def modelspec(pipeline: Pipeline, extra: Mapping[str, object]) -> dict[str, str]:
    """The metadata of the file: ``format`` and the modelspec fields (version 1.0.0).

    Args:
        pipeline: what it is made of.
        extra: title, date, trigger_phrase …; names without a dot become ``modelspec.`` fields; null ones are left out.
    """
    architecture = "stable-diffusion-v1" + ("/inpainting" if pipeline.variant == "inpainting" else "")
    given = {key if "." in key else f"modelspec.{key}": str(value) for key, value in extra.items() if value is not None}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.prediction_type": pipeline.prediction,
        "modelspec.resolution": f"{pipeline.resolution}x{pipeline.resolution}",
        **given,
    }
