"""A model of two towers with random weights, as its maker would export it: pictures and texts as their mean colour.

A picture's vector is the mean of its pixels, a text's the mean of the vectors of its words, both times the same random
matrix. Words for colours have the vector of the colour, so "red" is nearest to red pictures if all is wired rightly.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.artifact import Bundle, ModelCard, Preprocessing, encoder_id, save_bundle
from export.graph import read_graph, wrap
from export.text import ForeignText, read_text_tower

SIDE, LENGTH, DIMENSION = 32, 8, 5
COLOURS = {"red": (220, 30, 30), "orange": (230, 165, 20), "green": (30, 200, 40), "blue": (30, 40, 220)}
PLAIN = ("a", "shoe", "photo", "of")  # words that say nothing about colour
IDS = {word: id for id, word in enumerate(("[PAD]", "[UNK]", "[START]", "[END]", *COLOURS, *PLAIN))}
MATRIX = np.random.default_rng(0).normal(size=(3, DIMENSION)).astype(np.float32)  # of both towers


def table() -> np.ndarray:
    """A vector for each token: (V, 3) float32. Those without a colour are almost nothing."""
    rows = [COLOURS.get(word, (2, 2, 2)) for word in IDS]
    return (np.array(rows) / 255).astype(np.float32)


def vector_of(tokens: Sequence[str]) -> np.ndarray:
    """What the text tower makes of these tokens, in numpy: (d,)."""
    return table()[[IDS[token] for token in tokens]].mean(axis=0) @ MATRIX


def write_tokenizer(file: Path, ids: Mapping[str, int] = IDS, says_padding: bool = True) -> Path:
    """A tokenizer of whole words, which marks the start and the end of a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordLevel(dict(ids), "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    marks = [(mark, ids[mark]) for mark in ("[START]", "[END]")]
    tokenizer.post_processor = TemplateProcessing(single="[START] $A [END]", special_tokens=marks)
    if says_padding:
        tokenizer.enable_padding(pad_id=ids["[PAD]"], pad_token="[PAD]")
    tokenizer.save(str(file))
    return file


def picture_nodes(given: str = "pixel_values", made: str = "image_embeds") -> list[onnx.NodeProto]:
    return [
        helper.make_node("GlobalAveragePool", [given], ["colour"]),
        helper.make_node("Flatten", ["colour"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], [made]),
    ]


def text_nodes(made: str = "text_embeds", masked: bool = True) -> list[onnx.NodeProto]:
    words = [helper.make_node("Gather", ["table", "input_ids"], ["words"])]
    if masked:
        words += [
            helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["kept", "last"], ["weights"]),
            helper.make_node("Mul", ["words", "weights"], ["of_text"]),
            helper.make_node("ReduceSum", ["of_text", "first"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["weights", "first"], ["count"], keepdims=0),
            helper.make_node("Div", ["sum", "count"], ["mean"]),
        ]
    else:
        words.append(helper.make_node("ReduceMean", ["words"], ["mean"], axes=[1], keepdims=0))
    return [*words, helper.make_node("MatMul", ["mean", "matrix"], [made])]


def write_graph(
    file: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    outputs: Sequence[str] | Mapping[str, int],
    matrix: np.ndarray = MATRIX,
) -> Path:
    """inputs: the type and the shape of each. outputs: names, perhaps with the number of their axes"""
    constants = {"table": table(), "matrix": matrix, "first": np.array([1]), "last": np.array([2])}
    used = {name for node in nodes for name in node.input}
    ranks = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs, 2)
    graph = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in ranks.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString())
    return file


PIXELS = {"pixel_values": (TensorProto.FLOAT, ("n", 3, SIDE, SIDE))}


def text_inputs(kind: int = TensorProto.INT64, shape: Sequence[int | str] = ("n", "length"), masked: bool = True):
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    return dict.fromkeys(names, (kind, shape))


def write_pictures(folder: Path, matrix: np.ndarray = MATRIX) -> Path:
    return write_graph(folder / "pictures.onnx", picture_nodes(), PIXELS, ["image_embeds"], matrix)


def write_text(folder: Path, masked: bool = True, matrix: np.ndarray = MATRIX, **inputs) -> Path:
    given = text_inputs(masked=masked, **inputs)
    return write_graph(folder / "text.onnx", text_nodes(masked=masked), given, ["text_embeds"], matrix)


def write_both(folder: Path, side: int | str = SIDE, masked: bool = True) -> Path:
    """Both towers in one file, as Optimum exports CLIP."""
    nodes, outputs = [*text_nodes(masked=masked), *picture_nodes()], ["text_embeds", "image_embeds"]
    pixels = {"pixel_values": (TensorProto.FLOAT, ("n", 3, side, side))}
    return write_graph(folder / "model.onnx", nodes, text_inputs(masked=masked) | pixels, outputs)


def make_bundle(folder: Path) -> Bundle:
    """The encoder as a bundle that reads text. Its files as their maker exported them stay next to it."""
    parts = folder.with_name(f"{folder.name}-parts")
    parts.mkdir(parents=True)
    pictures = read_graph(write_pictures(parts), None, "")
    graph = wrap(pictures, (0, 0, 0), (1, 1, 1), "none")
    tokenizer = write_tokenizer(parts / "tokenizer.json")
    given = ForeignText(write_text(parts), tokenizer, "", LENGTH, "", False)
    files, tower = read_text_tower(given, "pictures.onnx", DIMENSION)
    digest, preprocessing = hashlib.sha256(graph).hexdigest(), Preprocessing(SIDE)
    id = encoder_id("towers", digest, preprocessing)
    card = ModelCard(id, "towers", DIMENSION, preprocessing, digest, text=tower)
    return save_bundle(folder, graph, card, text=files)
