"""ONNX graphs that others made, as graphs that the service runs: uint8 pixels in, one vector for each picture out.

The graph gets the scaling to [0, 1], the normalisation and, if needed, a pooling, so that its card only says how a
picture becomes a square of pixels. Needs no torch.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, external_data_helper, helper, numpy_helper, version_converter

from export.artifact import BundleError

Pooling = Literal["none", "mean", "first"]
LEAST_OPSET, LEAST_IR = 17, 8  # older graphs are converted: quantisation per channel needs 13
PREFIX = "f/"  # before the names of the wrapped graph, so that they differ from ours
TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8)  # of inputs


@dataclass(frozen=True)
class ForeignGraph:
    """A graph that was read and checked."""

    name: str
    model: onnx.ModelProto
    size_px: int
    channels_first: bool
    """Whether its input is (N, 3, H, W) instead of (N, H, W, 3). A map among its outputs is taken to be alike."""
    output: str
    """Name of the tensor that is the embedding."""
    output_shape: tuple[int, ...]
    """Its shape for two pictures."""

    @property
    def takes_pixels(self) -> bool:
        """Whether its input is uint8."""
        return self.input.type.tensor_type.elem_type == TensorProto.UINT8

    @property
    def input(self) -> onnx.ValueInfoProto:
        return inputs_of(self.model)[0]


def read_graph(file: Path, size_px: int | None, output: str) -> ForeignGraph:
    """Read and run a graph once.

    size_px  side of its input; needed if the graph takes any
    output   name of its output; "" if it has one only
    raises   BundleError
    """
    if not file.is_file():
        raise BundleError(f"{file}: there is no such file")
    model = read_model(file)
    chosen = chosen_output(file, model, output, "--output")
    keep_needed(model, chosen)
    inputs = inputs_of(model)
    if len(inputs) != 1:
        raise BundleError(f"{file} has {len(inputs)} inputs, and an encoder has one, the pictures: {names_of(inputs)}")
    channels_first, side = _input_layout(file, inputs[0], size_px)
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
    model = onnx.ModelProto()
    model.CopyFrom(recent(graph.name, graph.model))
    rename(model.graph)
    taken = inputs_of(model)[0]
    if graph.takes_pixels and (any(mean) or any(value != 1 for value in std)):
        raise BundleError(f"{graph.name} takes uint8 pixels and normalises them itself: leave out --mean and --std")
    constants = {
        "scale": (1 / (255 * np.asarray(std, np.float64))).astype(np.float32),  # (3,)
        "shift": (np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32),
    }
    before: list[onnx.NodeProto] = []
    last = "pixels"
    if not graph.takes_pixels:
        before += [
            helper.make_node("Cast", [last], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
            helper.make_node("Sub", ["scaled", "shift"], ["normalised"]),
        ]
        last = "normalised"
    if graph.channels_first:
        before.append(helper.make_node("Transpose", [last], ["planes"], perm=[0, 3, 1, 2]))
        last = "planes"
    before.append(helper.make_node("Cast", [last], [taken.name], to=taken.type.tensor_type.elem_type))
    after = _pooled(graph, PREFIX + graph.output, pooling)
    if centre is None:
        after.append(helper.make_node("Identity", ["vector"], ["embedding"]))
    else:
        constants["centre"] = centre.astype(np.float32)
        after.append(helper.make_node("Sub", ["vector", "centre"], ["embedding"]))
    dimension = graph.output_shape[1 if len(graph.output_shape) == 4 and graph.channels_first else -1]
    size = graph.size_px
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", size, size, 3])
    return assembled(graph.name, model, [*before, *model.graph.node, *after], constants, [pixels], dimension)


def assembled(
    name: str,
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    inputs: Sequence[onnx.ValueInfoProto],
    dimension: int,
) -> bytes:
    """Those of the nodes that `embedding` float32 (N, d) depends on, as a graph with the weights of `model` and with
    these further constants, serialised. raises BundleError, which begins with `name`"""
    nodes = _needed(nodes, "embedding")
    used = {name for node in nodes for name in _taken(node)}
    weights = [*model.graph.initializer, *(numpy_helper.from_array(value, name) for name, value in constants.items())]
    whole = helper.make_graph(
        nodes,
        "encoder",
        inputs,
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", dimension])],
        [weight for weight in weights if weight.name in used],
        sparse_initializer=model.graph.sparse_initializer,
    )
    wrapped = helper.make_model(
        whole, opset_imports=model.opset_import, ir_version=max(model.ir_version, LEAST_IR), functions=model.functions
    )
    try:
        return wrapped.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf's limit of 2 GiB
        raise BundleError(f"{name} is too large for one file: {one_line(error)}") from error


def keep_needed(model: onnx.ModelProto, output: str) -> None:
    """Leave out of a model with several inputs what this output does not depend on: of CLIP in one file, the other
    tower."""
    if len(inputs_of(model)) < 2:
        return
    nodes = _needed(model.graph.node, output)
    used = {name for node in nodes for name in _taken(node)}
    _replace(model.graph.node, nodes)
    _replace(model.graph.output, [value for value in model.graph.output if value.name == output])
    for part in (model.graph.input, model.graph.initializer):
        _replace(part, [value for value in part if value.name in used])


def _replace(part: Any, kept: Sequence[Any]) -> None:
    """part: a list inside a graph. kept: some of its elements"""
    kept = copy.deepcopy(kept)
    del part[:]
    part.extend(kept)


def _needed(nodes: Sequence[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """The nodes that `output` depends on. A graph lists its nodes in the order in which they can be computed."""
    names, kept = {output}, []
    for node in reversed(nodes):
        if names.intersection(node.output):
            names |= _taken(node) - {""}  # "": an optional one, left out
            kept.append(node)
    return kept[::-1]


def rename(graph: onnx.GraphProto) -> None:
    """Put PREFIX before the names of all tensors, in graphs inside nodes too: onnx.compose.add_prefix misses some."""
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = PREFIX + value.name
    for sparse in graph.sparse_initializer:
        sparse.values.name = PREFIX + sparse.values.name
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [PREFIX + name if name else "" for name in names]  # "": an optional one, left out
        for attribute in node.attribute:
            for inner in _graphs(attribute):
                rename(inner)


def _graphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _taken(node: onnx.NodeProto) -> set[str]:
    """Names of the tensors that a node takes, those of the graphs inside it (If, Loop) included."""
    inner = [graph for attribute in node.attribute for graph in _graphs(attribute)]
    return set(node.input).union(
        *({value.name for value in graph.output}.union(*map(_taken, graph.node)) for graph in inner)
    )


def recent(name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, of LEAST_OPSET or later. raises BundleError"""
    if _opset(model) >= LEAST_OPSET:
        return model
    try:
        return version_converter.convert_version(model, LEAST_OPSET)
    except Exception as error:  # its own, for nodes that it does not know
        raise BundleError(
            f"{name} has opset {_opset(model)} and cannot be converted to {LEAST_OPSET}: {one_line(error)}"
        ) from error


def foreign_embedding(
    graph: ForeignGraph, pixels: np.ndarray, mean: Sequence[float], std: Sequence[float], pooling: Pooling
) -> np.ndarray:
    """The same computed in numpy around the original graph, to check `wrap`: uint8 (n, S, S, 3) -> (n, d)."""
    x = pixels if graph.takes_pixels else (pixels / 255 - np.asarray(mean)) / np.asarray(std)
    x = x.transpose(0, 3, 1, 2) if graph.channels_first else x
    kind = helper.tensor_dtype_to_np_dtype(graph.input.type.tensor_type.elem_type)
    session = session_of(graph.name, graph.model)
    h = np.asarray(session.run([graph.output], {graph.input.name: x.astype(kind)})[0])
    if pooling == "first":
        h = h[:, 0]
    elif pooling == "mean":
        places = (1,) if h.ndim == 3 else (2, 3) if graph.channels_first else (1, 2)
        h = h.mean(axis=places)
    return h.astype(np.float32)


def read_model(file: Path) -> onnx.ModelProto:
    """raises BundleError"""
    try:
        model = onnx.load(file, load_external_data=False)
        if not model.graph.node:
            raise BundleError(f"{file} is not an ONNX graph: it has no nodes")
        if _opset(model) > onnx.defs.onnx_opset_version():
            raise BundleError(
                f"{file} has opset {_opset(model)}, and opsets up to {onnx.defs.onnx_opset_version()} can be read: "
                "export it with a lower one"
            )
        missing = [name for name in _external_files(model) if not (file.parent / name).is_file()]
        if missing:
            raise BundleError(f"{file} has its weights in {missing[0]}, which is not next to it")
        onnx.load_external_data_for_model(model, str(file.parent))
        onnx.checker.check_model(model)
    except BundleError:
        raise
    except Exception as error:  # protobuf and the checker each have their own
        raise BundleError(f"{file} is not an ONNX graph that can be read: {one_line(error)}") from error
    del model.graph.value_info[:]  # shapes for the batch size that it was exported with
    return model


def inputs_of(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Without the initialisers, which are among the inputs of older graphs."""
    initialisers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initialisers]


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _external_files(model: onnx.ModelProto) -> list[str]:
    """Names of the files, next to the graph's, that hold its weights."""
    tensors = [tensor for tensor in model.graph.initializer if external_data_helper.uses_external_data(tensor)]
    return sorted({entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"})


def _input_layout(file: Path, value: onnx.ValueInfoProto, size_px: int | None) -> tuple[bool, int]:
    kind = value.type.tensor_type
    sides = [dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim]
    if len(sides) == 4 and not isinstance(sides[1], int) and sides[3] != 3:
        sides[1] = kind.shape.dim[1].dim_value = 3  # any number of channels: (N, C, H, W)
    if kind.elem_type not in TYPES or len(sides) != 4 or 3 not in (sides[1], sides[3]):
        raise BundleError(
            f"{file}: its input {value.name} is {_type(kind.elem_type)} {shape_in_words(sides)}, and an encoder takes "
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
    side = fixed.pop() if fixed else size_px or 0
    for dim in kind.shape.dim[2:] if channels_first else kind.shape.dim[1:3]:
        dim.dim_value = side
    return channels_first, side


def chosen_output(file: Path, model: onnx.ModelProto, output: str, option: str) -> str:
    """The name of the output: `output`, which the option gives, or the only one. raises BundleError"""
    own = [value.name for value in model.graph.output]
    if not output:
        if len(own) > 1:
            raise BundleError(f"{file} has several outputs: give {option}, one of {', '.join(own)}")
        return own[0]
    if output not in own and not any(output in node.output for node in model.graph.node):
        raise BundleError(f"{file} has no output {output}; it has {', '.join(own)}")
    return output


def _tried(file: Path, model: onnx.ModelProto, output: str, channels_first: bool, side: int) -> tuple[int, ...]:
    """Shape of the output for two pictures, which must not depend on each other."""
    session, taken = session_of(str(file), model), inputs_of(model)[0]
    kind = taken.type.tensor_type.elem_type
    shape = (2, 3, side, side) if channels_first else (2, side, side, 3)
    largest = 255 if kind == TensorProto.UINT8 else 1
    pictures = (np.random.default_rng(0).random(shape) * largest).astype(helper.tensor_dtype_to_np_dtype(kind))
    try:
        both = np.asarray(session.run([output], {taken.name: pictures})[0])
        alone = np.asarray(session.run([output], {taken.name: pictures[:1]})[0])
    except Exception as error:  # ONNX Runtime has an exception class for each of its states
        raise BundleError(
            f"{file} does not run on two pictures of {side} px at once: {one_line(error)}. Was it exported for a "
            "batch of one? Then export it with a variable batch size"
        ) from error
    if not (np.isfinite(both).all() and np.isfinite(alone).all()):
        raise BundleError(f"{file} gives values that are NaN or infinite, so it cannot be an encoder")
    if len(both) != 2 or not np.allclose(both[:1], alone, rtol=1e-3, atol=1e-3 * float(np.abs(alone).max() or 1)):
        raise BundleError(f"{file} gives another result for a picture that is not alone: its batch size is fixed")
    return both.shape


def _pooled(graph: ForeignGraph, output: str, pooling: Pooling) -> list[onnx.NodeProto]:
    """Nodes from the output to float32 `vector` (N, d). raises BundleError: the output needs another pooling."""
    shape = graph.output_shape
    shown = shape_in_words(["N", *shape[1:]])
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
        if not graph.channels_first:
            nodes.append(helper.make_node("Transpose", [output], ["channels_first"], perm=[0, 3, 1, 2]))
            output = "channels_first"
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


def open_session(name: str, graph: bytes) -> onnxruntime.InferenceSession:
    """A session on the CPU that prints nothing. raises BundleError, which begins with `name`"""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has an exception class for each of its states
        raise BundleError(
            f"{name} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {one_line(error)}"
        ) from error


def session_of(name: str, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return open_session(f"{name} (opset {_opset(model)})", model.SerializeToString())


def _type(kind: int) -> str:
    return TensorProto.DataType.Name(kind).lower()


def shape_in_words(sides: Sequence[Any]) -> str:
    return f"({', '.join(map(str, sides))})"


def names_of(values: Sequence[onnx.ValueInfoProto]) -> str:
    return ", ".join(value.name for value in values)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
