"""Headers of ONNX files: of whole ones, damaged ones, and anything else."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from handlers.crop.faces import YUNET
from handlers.models.headers import HeaderError
from handlers.models.onnx_header import OnnxHeader, Tensor, read_header
from tests.networks import red_network, written


@cache
def whole() -> bytes:
    return red_network(32)


def header_of(content: bytes) -> OnnxHeader:
    with TemporaryDirectory() as folder:
        return read_header(written(Path(folder), content))


def test_inputs_and_outputs_are_read() -> None:
    header = header_of(whole())
    assert header.inputs == (Tensor("input.1", True, (1, 3, 32, 32)),)
    assert [output.name for output in header.outputs] == ["mask", "side"]
    assert header.outputs[0].shape == (1, 1, 32, 32)


def test_the_file_of_others_is_read() -> None:
    header = read_header(YUNET)
    assert [tensor.shape[:2] for tensor in header.inputs] == [(1, 3)]
    assert len(header.outputs) == 12


def test_weights_among_the_inputs_are_none_and_open_sizes_are_none() -> None:
    values = numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weights")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["in", "weights"], ["out"])],
        "old",
        [
            helper.make_tensor_value_info("weights", TensorProto.FLOAT, (1, 3, 1, 1)),
            helper.make_tensor_value_info("in", TensorProto.FLOAT, ("batch", 3, None, 0)),
            helper.make_tensor_value_info("half", TensorProto.FLOAT16, None),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [values],
    )
    header = header_of(helper.make_model(graph, ir_version=3).SerializeToString())
    assert header.inputs == (Tensor("in", True, (None, 3, None, None)), Tensor("half", False, ()))
    assert header.outputs == (Tensor("out", True, ()),)


def test_weights_in_another_file_are_told(tmp_path: Path) -> None:
    tensor = TensorProto(name="weights", data_location=TensorProto.EXTERNAL)
    graph = helper.make_graph([], "apart", [], [], [tensor])
    with pytest.raises(HeaderError, match="another file"):
        header_of(helper.make_model(graph, ir_version=8).SerializeToString())


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>no such file</html>", b"\x80\x02}q\x00.", b"\x08" * 50, b"\x00" * 5000, b"\xff" * 5000, b"\x08\x06"],
    ids=["empty", "page", "pickle", "eights", "zeros", "ones", "version only"],
)
def test_what_is_no_onnx_file_is_told(content: bytes) -> None:
    with pytest.raises(HeaderError):
        header_of(content)


@given(st.integers(0, len(whole()) - 1))
def test_a_file_that_was_cut_off_is_never_taken_for_a_whole_one(length: int) -> None:
    try:
        header = header_of(whole()[:length])
    except HeaderError:
        return
    # A cut between two fields behind the graph (the version of the operators) leaves a file that is whole in itself.
    assert header == header_of(whole())


@given(st.lists(st.tuples(st.integers(0, len(whole()) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_file_is_a_header_or_told(changes: list[tuple[int, int]]) -> None:
    content = bytearray(whole())
    for place, value in changes:
        content[place] = value
    try:
        header = header_of(bytes(content))
    except HeaderError as error:
        assert str(error)  # noqa: PT017 - either outcome is right
        return
    assert all(size is None or size > 0 for tensor in (*header.inputs, *header.outputs) for size in tensor.shape)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_header_or_told(content: bytes) -> None:
    try:
        header_of(content)
    except HeaderError as error:
        assert str(error)  # noqa: PT017 - either outcome is right


def test_a_file_of_nothing_but_parts_ends() -> None:
    """Two million empty fields: reading gives up instead of going through them all."""
    with pytest.raises(HeaderError, match="more parts"):
        header_of(b"\x08\x00" * 2_000_000)
