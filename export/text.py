"""The text tower of an encoder that others trained, such as CLIP's, as the files of a bundle that reads text.

The graph gets inputs of fixed names and types, so that its card only says how a text becomes tokens. Needs no torch.
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.artifact import BundleError, TextFiles, probe_values
from export.graph import (
    PREFIX,
    assembled,
    chosen_output,
    inputs_of,
    keep_needed,
    names_of,
    one_line,
    open_session,
    read_model,
    recent,
    rename,
    session_of,
    shape_in_words,
)
from export.tokens import PROBE_TEXT, NoTokenizers, TextTower, Tokens, open_tokenizer

KINDS = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)  # of inputs
TEXTS = ("red", "A photo of two green bottles on a table, and of nothing else.")  # that a tower is tried with
PARITY_LIMIT = 1e-4  # largest difference to the graph of others, relative to its largest value


@dataclass(frozen=True)
class ForeignText:
    """A text tower as its maker exported it. Options as in to_onnx.ExportSettings."""

    graph: Path
    tokenizer: Path
    output: str
    context_length: int | None
    pad_token: str
    lower_case: bool


def read_text_tower(given: ForeignText, pictures: str, dimension: int) -> tuple[TextFiles, TextTower]:
    """Read a text tower, and try it.

    pictures   names the picture tower in messages
    dimension  d of its embeddings
    returns    the files of the bundle, and the card's section about them
    raises     BundleError
    """
    file = given.graph
    content, tokenizer = _read_tokenizer(given.tokenizer)
    if not file.is_file():
        raise BundleError(f"{file}: there is no such file")
    model = read_model(file)
    output = chosen_output(file, model, given.output, "--text-output")
    keep_needed(model, output)
    ids, mask = _chosen_inputs(file, model)
    tower = TextTower(_length(given, ids, tokenizer), _pad(given, tokenizer), given.lower_case)
    if output not in {value.name for value in model.graph.output}:
        model.graph.output.append(helper.make_empty_tensor_value_info(output))
    theirs = _Theirs(file, model, ids, mask, output)
    tokens = Tokens(tokenizer, tower)
    expected = [theirs(_tokens_of(text, tokens, given, tower)) for text in TEXTS]
    _check_vectors(given, expected, pictures, dimension)
    if not np.array_equal(theirs(tokens(TEXTS[0])), expected[0]):
        raise BundleError(f"{file} gives another vector for the same text, so it cannot be a text tower")
    _check_vocabulary(given, theirs, tokenizer, tower)

    graph = _wrap(file, model, ids, mask, output, tower.length, dimension)
    session = open_session(str(file), graph)
    for text, theirs_of_text in zip(TEXTS, expected, strict=True):
        ours = np.asarray(session.run(["embedding"], tokens(text))[0])
        error = np.abs(ours - theirs_of_text).max() / np.abs(theirs_of_text).max()
        if not error <= PARITY_LIMIT:
            raise BundleError(f"{file}: its copy differs by {error:.1e} (limit {PARITY_LIMIT}); not exported")
    probe = probe_values(np.asarray(session.run(["embedding"], tokens(PROBE_TEXT))[0])[0])
    digests = [sha256(part).hexdigest() for part in (graph, content)]
    return TextFiles(graph, content), replace(tower, sha256=digests[0], tokenizer_sha256=digests[1], probe=probe)


def _read_tokenizer(file: Path) -> tuple[bytes, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BundleError(f"--tokenizer {file} cannot be read: {error.strerror}") from error
    try:
        return content, open_tokenizer(content)
    except NoTokenizers as error:
        raise BundleError(str(error)) from error
    except ValueError as error:
        raise BundleError(
            f"--tokenizer {file} is no tokenizer.json that the package tokenizers reads: {error}"
        ) from error


def _chosen_inputs(file: Path, model: onnx.ModelProto) -> tuple[onnx.ValueInfoProto, onnx.ValueInfoProto | None]:
    """The inputs for the ids of tokens and for the mask, if it takes one."""
    inputs = inputs_of(model)
    for value in inputs:
        kind = value.type.tensor_type
        if kind.elem_type not in KINDS or len(kind.shape.dim) != 2:
            sides = [dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim]
            raise BundleError(
                f"{file}: its input {value.name} is {TensorProto.DataType.Name(kind.elem_type).lower()} "
                f"{shape_in_words(sides)}, and a text tower takes tokens: whole numbers (N, L)"
            )
    masks = [value for value in inputs if "mask" in value.name.lower()]
    ids = [value for value in inputs if value not in masks]
    if len(ids) != 1 or len(masks) > 1:
        raise BundleError(
            f"{file} has the inputs {names_of(inputs) or 'none'}, and a text tower takes the ids of tokens and perhaps "
            "an attention mask"
        )
    return ids[0], masks[0] if masks else None


def _length(given: ForeignText, ids: onnx.ValueInfoProto, tokenizer: Any) -> int:
    """The context length: that of the graph, of the option, or of the tokenizer's file."""
    fixed, option = ids.type.tensor_type.shape.dim[1].dim_value, given.context_length
    if fixed and option not in (None, fixed):
        raise BundleError(f"{given.graph} takes {fixed} tokens, not {option}: leave --context-length out")
    known = fixed or option or (tokenizer.truncation or {}).get("max_length") or (tokenizer.padding or {}).get("length")
    if not known:
        raise BundleError(
            f"{given.graph} takes any number of tokens: give --context-length, the number that it was trained with"
        )
    return known


def _pad(given: ForeignText, tokenizer: Any) -> int:
    """Id of the token that fills up a text: that of the option, or of the tokenizer's file."""
    if given.pad_token:
        id = tokenizer.token_to_id(given.pad_token)
        if id is None:
            raise BundleError(f"{given.tokenizer} has no token {given.pad_token}, which --pad-token names")
        return id
    if tokenizer.padding is None:
        raise BundleError(
            f"{given.tokenizer} does not say which token fills up a short text: give --pad-token, as pad_token in the "
            "model's tokenizer_config.json"
        )
    return tokenizer.padding["pad_id"]


class _Theirs:
    """The graph as its maker exported it."""

    def __init__(
        self,
        file: Path,
        model: onnx.ModelProto,
        ids: onnx.ValueInfoProto,
        mask: onnx.ValueInfoProto | None,
        output: str,
    ) -> None:
        self._file, self._ids, self._mask, self._output = file, ids, mask, output
        self._session = session_of(str(file), model)

    def __call__(self, tokens: dict[str, np.ndarray]) -> np.ndarray:
        """Raises BundleError."""
        inputs = {}
        for value, numbers in ((self._ids, tokens["ids"]), (self._mask, tokens["mask"])):
            if value is not None:
                kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                inputs[value.name] = numbers.astype(kind)
        try:
            return np.asarray(self._session.run([self._output], inputs)[0])
        except Exception as error:  # ONNX Runtime has an exception class for each of its states
            length = tokens["ids"].shape[1]
            raise BundleError(f"{self._file} does not run on one text of {length} tokens: {one_line(error)}") from error


def _tokens_of(text: str, tokens: Tokens, given: ForeignText, tower: TextTower) -> dict[str, np.ndarray]:
    made = tokens(text)
    if made["ids"].shape[1] != tower.length:
        raise BundleError(
            f"a context length of {tower.length} is too short for {given.tokenizer}, which adds tokens at the start "
            "and the end of a text"
        )
    return made


def _check_vectors(given: ForeignText, vectors: list[np.ndarray], pictures: str, dimension: int) -> None:
    file, (first, second) = given.graph, vectors
    if first.ndim != 2 or first.shape[0] != 1:
        raise BundleError(
            f"{file}: its output has the shape {shape_in_words(first.shape)} for one text, instead of a vector (1, d): "
            "name the right one with --text-output"
        )
    if first.shape[1] != dimension:
        raise BundleError(
            f"{file} gives texts {first.shape[1]} numbers, and {pictures} gives pictures {dimension}: they must be the "
            "two towers of one model, with the outputs that it compares (--output, --text-output)"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all() and first.any() and second.any()):
        raise BundleError(f"{file} gives values that are NaN, infinite or all zero, so it cannot be a text tower")
    if np.array_equal(first, second):
        raise BundleError(f"{file} gives two different texts the same vector: is {given.tokenizer} its tokenizer?")


def _check_vocabulary(given: ForeignText, theirs: _Theirs, tokenizer: Any, tower: TextTower) -> None:
    last = max(tokenizer.get_vocab(with_added_tokens=True).values())
    whole = np.ones((1, tower.length), np.int64)
    try:
        theirs({"ids": last * whole, "mask": whole})
    except BundleError as error:
        raise BundleError(
            f"{given.graph} does not know the token {last} of {given.tokenizer}, which must be the tokenizer of "
            "another model"
        ) from error


def _wrap(
    file: Path,
    model: onnx.ModelProto,
    ids: onnx.ValueInfoProto,
    mask: onnx.ValueInfoProto | None,
    output: str,
    length: int,
    dimension: int,
) -> bytes:
    """The graph as `ids` and `mask` int64 (N, L) -> `embedding` float32 (N, d), serialised. raises BundleError"""
    kinds = {"ids": ids, "mask": mask}
    before = [
        helper.make_node("Cast", [name], [PREFIX + value.name], to=value.type.tensor_type.elem_type)
        for name, value in kinds.items()
        if value is not None
    ]
    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(recent(str(file), model))
    rename(wrapped.graph)
    after = helper.make_node("Cast", [PREFIX + output], ["embedding"], to=TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["N", length]) for name in kinds]
    return assembled(str(file), wrapped, [*before, *wrapped.graph.node, after], {}, inputs, dimension)
