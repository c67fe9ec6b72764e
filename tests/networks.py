"""Small ONNX networks whose mask is known: what is red."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from handlers.crop.window import Box

RED, GROUND = (220, 20, 30), (60, 90, 110)


def red_network(
    side: int = 64,
    *,
    channels: int = 3,
    outputs: int = 1,
    logits: bool = False,
    shape: tuple[int | str, ...] | None = None,
    steepness: float = 8.0,
    **convolution: Any,
) -> bytes:
    """An ONNX file that takes [1, 3, side, side], as the zoo's do, and gives how red each place is.

    Args:
        side: of its input.
        channels: of its input.
        outputs: how many channels its mask has.
        logits: whether it leaves out the sigmoid.
        shape: of its input, where it is another.
        steepness: how sure it is.
        convolution: attributes of its convolution, perhaps senseless ones.
    """
    weights = np.zeros((outputs, channels, 1, 1), np.float32)
    weights[:, :3, 0, 0] = np.asarray([steepness, -steepness, -steepness], np.float32)[:channels]
    bias = np.full(outputs, -steepness, np.float32)
    result = "grey" if logits else "mask"
    nodes = [
        helper.make_node("Conv", ["input.1", "weights", "bias"], ["grey"], **{"kernel_shape": [1, 1], **convolution})
    ]
    if not logits:
        nodes.append(helper.make_node("Sigmoid", ["grey"], ["mask"]))
    nodes.append(helper.make_node("Relu", ["grey"], ["side"]))
    graph = helper.make_graph(
        nodes,
        "red",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape or (1, channels, side, side))],
        [
            helper.make_tensor_value_info(result, TensorProto.FLOAT, (1, outputs, side, side)),
            # U²-Net gives its inner masks as well, after the one that counts.
            helper.make_tensor_value_info("side", TensorProto.FLOAT, (1, outputs, side, side)),
        ],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    content: bytes = model.SerializeToString()
    return content


def written(folder: Path, content: bytes, name: str = "u2netp.onnx") -> Path:
    """A file with that content."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_bytes(content)
    return file


def red_picture(size: tuple[int, int], box: Box) -> Image.Image:
    """A picture with a red disc that fills a box (0..1), beside a larger and brighter thing that is not red."""
    image = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0.4 * size[0], 0.4 * size[1], 0.6 * size[0], 0.6 * size[1]), fill=(240, 240, 200))
    width, height = size
    draw.ellipse((box[0] * width, box[1] * height, box[2] * width, box[3] * height), fill=RED)
    return image
