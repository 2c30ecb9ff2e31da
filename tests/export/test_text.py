"""A text tower is exported with the tower for pictures, gives its own vectors, and unusable ones are named."""

import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

from export.artifact import CARD, TEXT_GRAPH, TOKENIZER, BundleError, ModelCard, load_bundle
from export.paths import parse_settings
from export.quantize import QuantizeSettings, quantize
from export.to_onnx import ExportSettings, export
from export.tokens import TextTower, Tokens, open_tokenizer
from serving.inference.text import TextEncoder
from tests import towers
from tests.towers import IDS, LENGTH

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")  # the exporter's own


@pytest.fixture
def exported(tmp_path):
    """exported(text file, ...) -> the bundle of both towers."""

    def call(text=None, pictures=None, tokenizer=None, **settings):
        pictures = pictures or towers.write_pictures(tmp_path)
        tokenizer = tokenizer or towers.write_tokenizer(tmp_path / "tokenizer.json")
        settings = {"context_length": LENGTH, "out": tmp_path / "encoder", **settings}
        given = ExportSettings(str(pictures), text=text or towers.write_text(tmp_path), tokenizer=tokenizer, **settings)
        return export(given)[0]

    return call


def run(bundle, text: str) -> np.ndarray:
    """The vector of a text by the files of the bundle."""
    tokens = Tokens(open_tokenizer((bundle.folder / TOKENIZER).read_bytes()), bundle.card.text)
    session = onnxruntime.InferenceSession(bundle.folder / TEXT_GRAPH, providers=["CPUExecutionProvider"])
    return session.run(["embedding"], tokens(text))[0][0]


def test_the_bundle_gives_the_vectors_of_the_towers(exported, tmp_path):
    bundle = exported()
    assert bundle.card == load_bundle(bundle.folder).card
    assert (bundle.card.text.length, bundle.card.text.pad, bundle.card.text.lower_case) == (LENGTH, 0, False)
    for text, tokens in {"a red shoe": ("a", "red", "shoe"), "pink": ("[UNK]",), "": ()}.items():
        expected = towers.vector_of(["[START]", *tokens, "[END]"])
        np.testing.assert_allclose(run(bundle, text), expected, atol=1e-6)
        vector = TextEncoder(bundle).vector(text)
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)
    without = export(ExportSettings(str(tmp_path / "pictures.onnx"), out=tmp_path / "pictures"))[0]
    assert bundle.card.id == without.card.id and without.card.text is None  # collections stay valid
    assert {file.name for file in without.folder.iterdir()} == {"encoder.onnx", CARD}


@pytest.mark.parametrize(
    "inputs",
    [
        {"kind": TensorProto.INT32},
        {"shape": (1, LENGTH)},
        {"masked": False, "shape": ("n", LENGTH)},
    ],
    ids=["int32", "fixed sizes", "no mask"],
)
def test_graphs_get_tokens_as_they_take_them(exported, tmp_path, inputs):
    bundle = exported(towers.write_text(tmp_path, **inputs), context_length=None if "shape" in inputs else LENGTH)
    padding = [] if inputs.get("masked", True) else ["[PAD]"] * (LENGTH - 4)
    expected = towers.vector_of(["[START]", "green", "shoe", "[END]", *padding])
    np.testing.assert_allclose(run(bundle, "green shoe"), expected, atol=1e-6)


def test_both_towers_may_be_in_one_file(exported, tmp_path):
    both = towers.write_both(tmp_path)
    with pytest.raises(BundleError, match=r"model.onnx has several outputs: give --output, one of text_embeds, image_"):
        exported(both, both)
    with pytest.raises(BundleError, match=r"model.onnx has several outputs: give --text-output, one of"):
        exported(both, both, output="image_embeds")
    bundle = exported(both, both, output="image_embeds", text_output="text_embeds")
    np.testing.assert_allclose(run(bundle, "red"), towers.vector_of(["[START]", "red", "[END]"]), atol=1e-6)
    session = onnxruntime.InferenceSession(bundle.graph, providers=["CPUExecutionProvider"])
    colour = np.full((1, towers.SIDE, towers.SIDE, 3), towers.COLOURS["red"], np.uint8)
    expected = np.array(towers.COLOURS["red"]) / 255 @ towers.MATRIX
    np.testing.assert_allclose(session.run(["embedding"], {"pixels": colour})[0][0], expected, atol=1e-5)
    assert "table" not in {tensor.name for tensor in session.get_inputs()} and len(session.get_inputs()) == 1


@pytest.mark.parametrize("text", ["red", "a photo of a red shoe", "a " * 40, "", " red \n shoe ", "Red é 日本 \ud800"])
@pytest.mark.parametrize("direction", ["right", "left"])
def test_tokens_are_those_of_the_package_tokenizers(tmp_path, text, direction):
    content = towers.write_tokenizer(tmp_path / "tokenizer.json").read_bytes()
    tokenizer = open_tokenizer(content)
    tokenizer.enable_padding(direction=direction)
    tokens = Tokens(tokenizer, TextTower(LENGTH, IDS["[PAD]"]))(text)
    plain = open_tokenizer(content)
    plain.enable_truncation(LENGTH)
    plain.no_padding()
    ids = plain.encode(text.replace("\ud800", "?")).ids
    padding = [IDS["[PAD]"]] * (LENGTH - len(ids))
    expected, mask = ids + padding, [1] * len(ids) + [0] * len(padding)
    if direction == "left":
        expected, mask = padding + ids, mask[::-1]
    assert (tokens["ids"].tolist(), tokens["mask"].tolist()) == ([expected], [mask])
    assert tokens["ids"].dtype == tokens["mask"].dtype == np.int64
    assert ids[0] == IDS["[START]"] and ids[-1] == IDS["[END]"]  # also where the text is cut


def test_text_is_lower_cased_if_the_card_says_so(exported):
    plain = run(exported(), "red")
    assert not np.allclose(run(exported(), "RED"), plain)
    np.testing.assert_array_equal(run(exported(lower_case=True), "RED"), plain)


def test_what_the_tokenizer_says_of_padding_and_length_is_used_and_options_go_first(exported, tmp_path):
    tokenizer = towers.write_tokenizer(tmp_path / "own.json", says_padding=False)
    with pytest.raises(BundleError, match=r"own.json does not say which token fills up a short text: give --pad-token"):
        exported(tokenizer=tokenizer)
    with pytest.raises(BundleError, match=r"own.json has no token <pad>, which --pad-token names"):
        exported(tokenizer=tokenizer, pad_token="<pad>")
    assert exported(tokenizer=tokenizer, pad_token="[END]").card.text.pad == IDS["[END]"]
    with pytest.raises(BundleError, match=r"text.onnx takes any number of tokens: give --context-length"):
        exported(context_length=None)
    made = open_tokenizer(towers.write_tokenizer(tmp_path / "cuts.json").read_bytes())
    made.enable_truncation(6)
    made.save(str(tmp_path / "cuts.json"))
    assert exported(tokenizer=tmp_path / "cuts.json", context_length=None).card.text.length == 6
    assert exported(tokenizer=tmp_path / "cuts.json", context_length=7).card.text.length == 7


@pytest.mark.parametrize(("name", "pad", "masked"), [("clip", "<|endoftext|>", True), ("siglip", "</s>", False)])
def test_the_documented_commands_export_models_of_that_kind(tmp_path, monkeypatch, name, pad, masked):
    """With random weights, but with the inputs, outputs and tokens of the real ones."""
    document = (Path(__file__).parents[2] / "docs" / "collections.md").read_text().replace("\\\n", " ")
    [command] = re.findall(rf"^python export/to_onnx.py ({name}/.*)$", document, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    towers.write_both(tmp_path / name, "side", masked)
    ids = {pad if word == "[PAD]" else word: id for word, id in IDS.items()}
    towers.write_tokenizer(tmp_path / name / "tokenizer.json", ids, says_padding=False)
    bundle = export(parse_settings(ExportSettings, shlex.split(command)))[0]
    assert bundle.folder == tmp_path / "runs" / name / "encoder"
    text, preprocessing = bundle.card.text, bundle.card.preprocessing
    expected = (77, False, 1.0) if name == "clip" else (64, True, None)
    assert (text.length, text.lower_case, preprocessing.crop) == expected
    assert (text.pad, preprocessing.size_px, preprocessing.interpolation) == (IDS["[PAD]"], 224, "bicubic")


def random_vector(tmp_path):
    nodes = [*towers.text_nodes("steady"), helper.make_node("RandomNormalLike", ["steady"], ["text_embeds"])]
    return towers.write_graph(tmp_path / "text.onnx", nodes, towers.text_inputs(), ["text_embeds"])


def same_vector(tmp_path):
    nodes = towers.text_nodes()
    matrix = np.zeros_like(towers.MATRIX)
    nodes[-1:] = [
        helper.make_node("MatMul", ["mean", "matrix"], ["nothing"]),
        helper.make_node("Cos", ["nothing"], ["text_embeds"]),
    ]
    return towers.write_graph(tmp_path / "text.onnx", nodes, towers.text_inputs(), ["text_embeds"], matrix)


def tokens_instead(tmp_path):
    given = towers.text_inputs(masked=False)
    return towers.write_graph(tmp_path / "text.onnx", towers.text_nodes(masked=False)[:1], given, {"words": 3})


def no_graph(tmp_path):
    (tmp_path / "text.onnx").write_bytes(b"no graph")
    return tmp_path / "text.onnx"


def third_input(tmp_path):
    nodes = [
        *towers.text_nodes("alone"),
        helper.make_node("Cast", ["position_ids"], ["places"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["places"], ["place"]),
        helper.make_node("Add", ["alone", "place"], ["text_embeds"]),
    ]
    given = towers.text_inputs() | {"position_ids": (TensorProto.INT64, ("n", "length"))}
    return towers.write_graph(tmp_path / "text.onnx", nodes, given, ["text_embeds"])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            towers.write_pictures,
            r"its input pixel_values is float \(n, 3, 32, 32\), and a text tower takes tokens: whole",
        ),
        (third_input, r"has the inputs input_ids, attention_mask, position_ids, and a text tower takes the ids of"),
        (
            lambda path: towers.write_text(path, matrix=np.ones((3, 4), np.float32)),
            r"gives texts 4 numbers, and \S+ gives",
        ),
        (tokens_instead, r"its output has the shape \(1, 8, 3\) for one text, instead of a vector \(1, d\): name the"),
        (random_vector, "gives another vector for the same text, so it cannot be a text tower"),
        (same_vector, r"gives two different texts the same vector: is \S+tokenizer.json its tokenizer\?"),
        (lambda path: towers.write_text(path, matrix=np.full((3, 5), np.nan, np.float32)), "gives values that are NaN"),
        (lambda path: towers.write_text(path, shape=("n", 9)), r"takes 9 tokens, not 8: leave --context-length out"),
        (lambda path: towers.write_text(path, shape=(2, LENGTH)), "does not run on one text of 8 tokens"),
        (no_graph, "is not an ONNX graph"),
        (lambda path: path / "nothing.onnx", r"nothing.onnx: there is no such file"),
    ],
)
def test_what_is_no_text_tower_is_named(exported, tmp_path, make, sentence):
    with pytest.raises(BundleError, match=sentence):
        exported(make(tmp_path), towers.write_pictures(tmp_path))
    assert not (tmp_path / "encoder").exists()


def test_a_tokenizer_that_is_none_or_of_another_model_is_named(exported, tmp_path):
    with pytest.raises(BundleError, match=r"--tokenizer \S+nowhere.json cannot be read: No such file"):
        exported(tokenizer=tmp_path / "nowhere.json")
    (tmp_path / "vocab.json").write_text('{"red": 1}')
    with pytest.raises(
        BundleError, match=r"--tokenizer \S+vocab.json is no tokenizer.json that the package tokenizers r"
    ):
        exported(tokenizer=tmp_path / "vocab.json")
    larger = towers.write_tokenizer(tmp_path / "larger.json", IDS | {"rouge": len(IDS)})
    with pytest.raises(
        BundleError, match=rf"does not know the token {len(IDS)} of \S+larger.json, which must be the tok"
    ):
        exported(tokenizer=larger)
    with pytest.raises(BundleError, match=r"a context length of 1 is too short for \S+tokenizer.json"):
        exported(context_length=1)


def test_without_the_package_tokenizers_the_extra_is_named(exported, monkeypatch):
    bundle = exported()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        BundleError, match=r"^reading texts needs the package tokenizers: pip install 'twinview\[text\]'$"
    ):
        exported(tokenizer=bundle.folder / TOKENIZER)
    with pytest.raises(ValueError, match=r"pip install 'twinview\[text\]'"):
        TextEncoder(bundle).vector("red")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"text": "t.onnx"}, "--text t.onnx needs --tokenizer, the tokenizer.json of the model"),
        ({"tokenizer": "t.json"}, "--tokenizer is for a text tower: give its ONNX file with --text"),
        ({"pad_token": "x"}, "--pad-token is for a text tower"),
        ({"text": "t.onnx", "tokenizer": "t.json", "centre_on": "x"}, "--centre-on cannot be used with --text"),
        ({"context_length": 0}, "--context-length must be at least 1, not 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        ExportSettings("pictures.onnx", **settings)


def test_a_text_tower_is_for_onnx_files(tmp_path):
    with pytest.raises(BundleError, match="--text is for ONNX files; lite0 has no text tower here"):
        export(ExportSettings("lite0", text=tmp_path / "t.onnx", tokenizer=tmp_path / "t.json"))


def test_cards_of_before_are_read_as_those_of_encoders_without_text(exported):
    bundle = exported()
    facts = json.loads((bundle.folder / CARD).read_text())
    before = {name: value for name, value in facts.items() if name != "text"}
    assert ModelCard.from_dict(before) == dataclasses.replace(bundle.card, text=None)
    for wrong in ({"length": 0, "pad": 0}, {"length": 8}, 5, {"length": 8, "pad": -1}):
        (bundle.folder / CARD).write_text(json.dumps(facts | {"text": wrong}))
        with pytest.raises(BundleError, match="cannot be read as a model card"):
            load_bundle(bundle.folder)


@pytest.mark.parametrize("name", [TEXT_GRAPH, TOKENIZER])
def test_files_of_a_text_tower_that_are_missing_or_others_are_named(exported, name):
    bundle = exported()
    content = (bundle.folder / name).read_bytes()
    (bundle.folder / name).write_bytes(content + b" ")
    with pytest.raises(BundleError, match=rf"{name} is not the file its card describes"):
        TextEncoder(load_bundle(bundle.folder)).vector("red")
    (bundle.folder / name).unlink()
    with pytest.raises(BundleError, match=rf"has no {name}, which its card describes; export again"):
        load_bundle(bundle.folder)


def test_a_tower_that_gives_other_vectors_than_at_the_export_is_refused(exported):
    bundle = exported()
    tower = dataclasses.replace(bundle.card.text, probe=[value + 0.01 for value in bundle.card.text.probe])
    other = dataclasses.replace(bundle, card=dataclasses.replace(bundle.card, text=tower))
    with pytest.raises(BundleError, match=r"differs by .* from its output at the export"):
        TextEncoder(other).vector("red")


def test_a_smaller_bundle_keeps_the_text_tower(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle = exported()
    for i in range(12):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, 90, 255 - 20 * i)).save(tmp_path / "data" / f"{i}.png")
    smaller = quantize(QuantizeSettings(bundle.folder, to="fp16", data=str(tmp_path / "data")))
    shutil.rmtree(bundle.folder)
    assert load_bundle(smaller.folder).card.text == bundle.card.text
    assert np.isclose(np.linalg.norm(TextEncoder(smaller).vector("red")), 1)
