"""ONNX graphs that others made, as graphs that the service runs: uint8 pixels in, one vector for each picture out.

The graph gets the scaling to [0, 1], the normalisation and, if needed, a pooling, so that its card only says how a
picture becomes a square of pixels. Needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from export.artifact import BundleError

Pooling = Literal["none", "mean", "first"]
PREFIX = "f/"  # before the names of the wrapped graph, so that they differ from ours
TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8)  # of inputs


@dataclass(frozen=True)
class ForeignGraph:
    """A graph that was read and checked."""

    name: str
    model: onnx.ModelProto
    size_px: int
    channels_first: bool
    """Whether its input is (N, 3, H, W) instead of (N, H, W, 3)."""
    output: str
    """Name of the tensor that is the embedding."""
    output_shape: tuple[int, ...]
    """Its shape for two pictures."""


def read_graph(file: Path, size_px: int | None, output: str) -> ForeignGraph:
    """Read and run a graph once.

    size_px  side of its input; needed if the graph takes any
    output   name of its output; "" if it has one only
    raises   BundleError
    """
    if not file.is_file():
        raise BundleError(f"{file}: there is no such file")
    try:
        model = onnx.load(file)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, the checker and missing files of weights each have their own
        raise BundleError(f"{file} is not an ONNX graph that can be read: {_one_line(error)}") from error
    initialisers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initialisers]
    if len(inputs) != 1:
        raise BundleError(f"{file} has {len(inputs)} inputs, and an encoder has one, the pictures: {_names(inputs)}")
    channels_first, side = _input_layout(file, inputs[0], size_px)
    chosen = _chosen_output(file, model, output)
    inputs[0].type.tensor_type.shape.dim[0].dim_param = "N"
    if chosen not in {value.name for value in model.graph.output}:
        model.graph.output.append(helper.make_empty_tensor_value_info(chosen))
    shape = _tried(file, model, chosen, channels_first, side)
    return ForeignGraph(str(file), model, side, channels_first, chosen, shape)


def wrap(
    graph: ForeignGraph,
    mean: Sequence[float],
    std: Sequence[float],
    pooling: Pooling,
    centre: np.ndarray | None = None,
) -> bytes:
    """The graph as `pixels` uint8 (N, S, S, 3) -> `embedding` float32 (N, d), serialised.

    mean, std  (3,) each: its input is (x - mean) / std for x in [0, 1]; a graph that takes uint8 gets the pixels
    pooling    of an output that is not one vector: mean over its places, or the first token
    centre     (d,) to subtract from the output
    raises     BundleError
    """
    model = onnx.compose.add_prefix(graph.model, PREFIX)
    initialisers = {tensor.name for tensor in model.graph.initializer}
    taken = next(value for value in model.graph.input if value.name not in initialisers)
    kind = taken.type.tensor_type.elem_type
    constants = {
        "scale": (1 / (255 * np.asarray(std, np.float64))).astype(np.float32),  # (3,)
        "shift": (np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32),
    }
    before: list[onnx.NodeProto] = []
    last = "pixels"
    if kind != TensorProto.UINT8:
        before += [
            helper.make_node("Cast", [last], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
            helper.make_node("Sub", ["scaled", "shift"], ["normalised"]),
        ]
        last = "normalised"
    if graph.channels_first:
        before.append(helper.make_node("Transpose", [last], ["planes"], perm=[0, 3, 1, 2]))
        last = "planes"
    before.append(helper.make_node("Cast", [last], [taken.name], to=kind))
    after = _pooled(graph, PREFIX + graph.output, pooling)
    if centre is None:
        after.append(helper.make_node("Identity", ["vector"], ["embedding"]))
    else:
        constants["centre"] = centre.astype(np.float32)
        after.append(helper.make_node("Sub", ["vector", "centre"], ["embedding"]))
    dimension = graph.output_shape[1] if len(graph.output_shape) == 4 else graph.output_shape[-1]
    size = graph.size_px
    nodes = [*before, *model.graph.node, *after]
    whole = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", size, size, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", dimension])],
        [*model.graph.initializer, *(numpy_helper.from_array(value, name) for name, value in constants.items())],
    )
    wrapped = helper.make_model(
        whole, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
    try:
        return wrapped.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf's limit of 2 GiB
        raise BundleError(f"{graph.name} is too large for one file: {_one_line(error)}") from error


def foreign_embedding(
    graph: ForeignGraph, pixels: np.ndarray, mean: Sequence[float], std: Sequence[float], pooling: Pooling
) -> np.ndarray:
    """The same computed in numpy around the original graph, to check `wrap`: uint8 (n, S, S, 3) -> (n, d)."""
    session = _session(graph.name, graph.model)
    taken = session.get_inputs()[0]
    kind = next(value for value in graph.model.graph.input if value.name == taken.name).type.tensor_type.elem_type
    x = pixels if kind == TensorProto.UINT8 else (pixels / 255 - np.asarray(mean)) / np.asarray(std)
    x = x.transpose(0, 3, 1, 2) if graph.channels_first else x
    h = np.asarray(session.run([graph.output], {taken.name: x.astype(helper.tensor_dtype_to_np_dtype(kind))})[0])
    if pooling == "first":
        h = h[:, 0]
    elif pooling == "mean":
        h = h.mean(axis=(2, 3)) if h.ndim == 4 else h.mean(axis=1)
    return h.astype(np.float32)


def _input_layout(file: Path, value: onnx.ValueInfoProto, size_px: int | None) -> tuple[bool, int]:
    kind = value.type.tensor_type
    sides = [dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim]
    if kind.elem_type not in TYPES or len(sides) != 4 or 3 not in (sides[1], sides[3]):
        raise BundleError(
            f"{file}: its input {value.name} is {_type(kind.elem_type)} {_shape(sides)}, and an encoder takes "
            "pictures: numbers (N, 3, H, W) or (N, H, W, 3)"
        )
    channels_first = sides[1] == 3
    height, width = sides[2:] if channels_first else sides[1:3]
    fixed = {side for side in (height, width) if isinstance(side, int)}
    if len(fixed) > 1:
        raise BundleError(f"{file} takes pictures of {width} x {height} pixels, and an encoder takes squares")
    if fixed and size_px not in (None, *fixed):
        raise BundleError(f"{file} takes {fixed.pop()} px, not {size_px}: leave --size-px out")
    if not fixed and size_px is None:
        raise BundleError(f"{file} takes pictures of any size: give --size-px, the size that it was trained with")
    side = int(fixed.pop()) if fixed else int(size_px or 0)
    for dim in kind.shape.dim[2:] if channels_first else kind.shape.dim[1:3]:
        dim.dim_value = side
    return channels_first, side


def _chosen_output(file: Path, model: onnx.ModelProto, output: str) -> str:
    own = [value.name for value in model.graph.output]
    if not output:
        if len(own) > 1:
            raise BundleError(f"{file} has several outputs: give --output, one of {', '.join(own)}")
        return own[0]
    if output not in own and not any(output in node.output for node in model.graph.node):
        raise BundleError(f"{file} has no output {output}; it has {', '.join(own)}")
    return output


def _tried(file: Path, model: onnx.ModelProto, output: str, channels_first: bool, side: int) -> tuple[int, ...]:
    """Shape of the output for two pictures, which must not depend on each other."""
    session = _session(str(file), model)
    taken = session.get_inputs()[0]
    kind = next(value for value in model.graph.input if value.name == taken.name).type.tensor_type.elem_type
    shape = (2, 3, side, side) if channels_first else (2, side, side, 3)
    largest = 255 if kind == TensorProto.UINT8 else 1
    pictures = (np.random.default_rng(0).random(shape) * largest).astype(helper.tensor_dtype_to_np_dtype(kind))
    try:
        both = np.asarray(session.run([output], {taken.name: pictures})[0])
        alone = np.asarray(session.run([output], {taken.name: pictures[:1]})[0])
    except Exception as error:  # ONNX Runtime has an exception class for each of its states
        raise BundleError(
            f"{file} does not run on two pictures of {side} px at once: {_one_line(error)}. Was it exported for a "
            "batch of one? Then export it with a variable batch size"
        ) from error
    if len(both) != 2 or not np.allclose(both[:1], alone, rtol=1e-3, atol=1e-3 * float(np.abs(alone).max() or 1)):
        raise BundleError(f"{file} gives another result for a picture that is not alone: its batch size is fixed")
    return both.shape


def _pooled(graph: ForeignGraph, output: str, pooling: Pooling) -> list[onnx.NodeProto]:
    """Nodes from the output to float32 `vector` (N, d). raises BundleError: the output needs another pooling."""
    shape = graph.output_shape
    shown = _shape(["N", *shape[1:]])
    nodes: list[onnx.NodeProto] = []
    if len(shape) == 2:
        if pooling != "none":
            raise BundleError(
                f"{graph.name}: its output {graph.output} is a vector {shown} already; leave out --pooling"
            )
    elif len(shape) == 4:
        if pooling != "mean":
            raise BundleError(
                f"{graph.name}: its output {graph.output} is a map {shown} instead of a vector: --pooling mean takes "
                "the mean over its places"
            )
        nodes.append(helper.make_node("GlobalAveragePool", [output], ["map"]))
        nodes.append(helper.make_node("Flatten", ["map"], ["flat"], axis=1))
        output = "flat"
    elif len(shape) == 3:
        if pooling == "none":
            raise BundleError(
                f"{graph.name}: its output {graph.output} is a list of tokens {shown} instead of a vector: give "
                "--pooling first for the class token, or --pooling mean"
            )
        if pooling == "first":
            zero = helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array(0, np.int64)))
            nodes += [zero, helper.make_node("Gather", [output, "zero"], ["flat"], axis=1)]
        else:
            nodes.append(helper.make_node("Transpose", [output], ["tokens"], perm=[0, 2, 1]))
            nodes.append(helper.make_node("GlobalAveragePool", ["tokens"], ["map"]))
            nodes.append(helper.make_node("Flatten", ["map"], ["flat"], axis=1))
        output = "flat"
    else:
        raise BundleError(f"{graph.name}: its output {graph.output} {shown} is not a vector for each picture")
    return [*nodes, helper.make_node("Cast", [output], ["vector"], to=TensorProto.FLOAT)]


def _session(name: str, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has an exception class for each of its states
        opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
        raise BundleError(
            f"{name} (opset {opset}) cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {_one_line(error)}"
        ) from error


def _type(kind: int) -> str:
    return TensorProto.DataType.Name(kind).lower()


def _shape(sides: Sequence[Any]) -> str:
    return f"({', '.join(map(str, sides))})"


def _names(values: Sequence[onnx.ValueInfoProto]) -> str:
    return ", ".join(value.name for value in values)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
