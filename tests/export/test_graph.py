"""ONNX graphs that others made give their own embeddings in the service, and unusable ones are named."""

import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torchvision import transforms

from export.artifact import BundleError, read_pixels
from export.to_onnx import ExportSettings, export
from serving.inference.encoder import OnnxEncoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 16
PICTURES = np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)


def graph(
    tmp_path,
    nodes=(("Conv", ["x", "w"], ["map"]), ("GlobalAveragePool", ["map"], ["mean"]), ("Flatten", ["mean"], ["h"])),
    shape=("batch", 3, SIDE, SIDE),
    outputs=(("h", 2),),
    kind=TensorProto.FLOAT,
    opset=17,
    ir_version=8,
    constants=(),
):
    """A small graph of another project, made node by node, as a file."""
    weights = {"w": np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)} | dict(constants)
    made = helper.make_graph(
        [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "theirs",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name, rank in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    if ir_version < 4:
        made.input.extend(helper.make_tensor_value_info(v.name, v.data_type, v.dims) for v in made.initializer)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    file = tmp_path / "theirs.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def wrapped(file, tmp_path, **settings):
    return export(ExportSettings(str(file), out=tmp_path / "encoder", **settings))[0]


def embedding(bundle, pictures=PICTURES):
    session = onnxruntime.InferenceSession(bundle.graph, providers=["CPUExecutionProvider"])
    return session.run(["embedding"], {"pixels": pictures})[0]


def convolved(x):
    """The convolution of `graph`: float (N, 3, S, S) -> (N, 8, S - 2, S - 2)."""
    w = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    return torch.nn.functional.conv2d(torch.from_numpy(x).float(), torch.from_numpy(w)).numpy()


def planes(pictures=PICTURES, mean=(0, 0, 0), std=(1, 1, 1)):
    return ((pictures / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)


def close(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_planes_of_floats_are_made_of_pixels_and_normalised(tmp_path):
    bundle = wrapped(graph(tmp_path), tmp_path, mean=MEAN, std=STD, crop=0.875, interpolation="bilinear")
    close(embedding(bundle), convolved(planes(mean=MEAN, std=STD)).mean(axis=(2, 3)))
    close(OnnxEncoder(bundle)(PICTURES), embedding(bundle))
    card = bundle.card
    assert (card.preprocessing.size_px, card.preprocessing.crop, card.preprocessing.interpolation) == (
        SIDE,
        0.875,
        "bilinear",
    )
    assert (card.architecture, card.dimension, card.licence) == ("onnx:theirs", 8, "unknown")
    assert card.training == {"origin": "the file theirs.onnx"} and card.id.startswith("theirs-")


@pytest.mark.parametrize(
    ("shape", "side"),
    [(("n", "c", "h", "w"), SIDE), ((None, 3, None, None), SIDE), ((1, 3, SIDE, SIDE), None)],
    ids=["named sizes", "unknown sizes", "batch of one"],
)
def test_sizes_that_a_graph_leaves_open_are_decided(tmp_path, shape, side):
    bundle = wrapped(graph(tmp_path, shape=shape), tmp_path, size_px=side)
    close(embedding(bundle), convolved(planes()).mean(axis=(2, 3)))


def test_pixels_and_half_precision_are_given_as_the_graph_takes_them(tmp_path):
    nodes = (
        ("Cast", ["x"], ["f"], {"to": TensorProto.FLOAT}),
        ("ReduceMean", ["f"], ["h"], {"axes": [1, 2], "keepdims": 0}),
    )
    file = graph(tmp_path, nodes, ("n", SIDE, SIDE, 3), kind=TensorProto.UINT8)
    close(embedding(wrapped(file, tmp_path)), PICTURES.mean(axis=(1, 2)).astype(np.float32))
    with pytest.raises(BundleError, match=r"theirs.onnx takes uint8 pixels and normalises them itself: leave out"):
        wrapped(file, tmp_path, mean=MEAN)
    file = graph(tmp_path, nodes, ("n", SIDE, SIDE, 3), kind=TensorProto.FLOAT16)
    np.testing.assert_allclose(embedding(wrapped(file, tmp_path)), PICTURES.mean(axis=(1, 2)) / 255, atol=1e-3)


@pytest.mark.parametrize("opset", [7, 12, 20])
def test_graphs_of_any_opset_give_their_embedding(tmp_path, opset):
    bundle = wrapped(graph(tmp_path, opset=opset, ir_version=3 if opset < 10 else 8), tmp_path)
    close(embedding(bundle), convolved(planes()).mean(axis=(2, 3)))
    assert onnx.load(bundle.graph).opset_import[0].version == max(opset, 17)


def test_a_map_needs_the_mean_over_its_places(tmp_path):
    file = graph(tmp_path, [("Conv", ["x", "w"], ["map"])], outputs=(("map", 4),))
    with pytest.raises(BundleError, match=r"map \(N, 8, 14, 14\) instead of a vector: --pooling mean takes"):
        wrapped(file, tmp_path)
    close(embedding(wrapped(file, tmp_path, pooling="mean")), convolved(planes()).mean(axis=(2, 3)))


def test_a_map_of_a_graph_with_channels_last_is_pooled_over_its_places(tmp_path):
    nodes = [
        ("Transpose", ["x"], ["first"], {"perm": [0, 3, 1, 2]}),
        ("Conv", ["first", "w"], ["conv"]),
        ("Transpose", ["conv"], ["map"], {"perm": [0, 2, 3, 1]}),
    ]
    file = graph(tmp_path, nodes, ("n", SIDE, SIDE, 3), [("map", 4)])
    bundle = wrapped(file, tmp_path, pooling="mean")
    close(embedding(bundle), convolved(planes()).mean(axis=(2, 3)))
    assert bundle.card.dimension == 8


def test_tokens_are_pooled_by_the_mean_or_the_first(tmp_path):
    nodes = [
        ("Conv", ["x", "w"], ["map"]),
        ("Reshape", ["map", "shape"], ["flat"]),
        ("Transpose", ["flat"], ["tokens"], {"perm": [0, 2, 1]}),
    ]
    file = graph(tmp_path, nodes, outputs=(("tokens", 3),), constants={"shape": np.array([0, 8, -1])})
    tokens = convolved(planes()).reshape(3, 8, -1).transpose(0, 2, 1)
    with pytest.raises(BundleError, match=r"list of tokens \(N, 196, 8\) .*give --pooling first for the class token"):
        wrapped(file, tmp_path)
    close(embedding(wrapped(file, tmp_path, pooling="first")), tokens[:, 0])
    close(embedding(wrapped(file, tmp_path, pooling="mean")), tokens.mean(axis=1))


def test_one_of_several_outputs_or_an_inner_tensor_is_chosen_by_name(tmp_path):
    nodes = [
        ("Conv", ["x", "w"], ["map"]),
        ("GlobalAveragePool", ["map"], ["mean"]),
        ("Flatten", ["mean"], ["h"]),
        ("Relu", ["h"], ["logits"]),
    ]
    file = graph(tmp_path, nodes, outputs=(("logits", 2), ("map", 4)))
    with pytest.raises(BundleError, match=r"theirs.onnx has several outputs: give --output, one of logits, map"):
        wrapped(file, tmp_path)
    with pytest.raises(BundleError, match=r"theirs.onnx has no output nothing; it has logits, map"):
        wrapped(file, tmp_path, output="nothing")
    expected = convolved(planes()).mean(axis=(2, 3))
    close(embedding(wrapped(file, tmp_path, output="logits")), np.maximum(expected, 0))
    bundle = wrapped(file, tmp_path, output="h")
    close(embedding(bundle), expected)
    assert "Relu" not in [node.op_type for node in onnx.load(bundle.graph).graph.node]  # f alone
    with pytest.raises(BundleError, match=r"its output logits is a vector \(N, 8\) already; leave out --pooling"):
        wrapped(file, tmp_path, output="logits", pooling="mean")


def test_the_card_names_a_given_licence(tmp_path):
    assert wrapped(graph(tmp_path), tmp_path, licence="MIT").card.licence == "MIT"


@pytest.mark.parametrize(
    ("how", "settings", "message"),
    [
        ({"shape": ("n", 3, "h", "w")}, {}, "takes pictures of any size: give --size-px, the size that it was trained"),
        ({}, {"size_px": 32}, "takes 16 px, not 32: leave --size-px out"),
        ({"shape": ("n", 3, 16, 24)}, {}, "takes pictures of 24 x 16 pixels, and an encoder takes squares"),
        ({"shape": ("n", 4, 16, 16)}, {}, r"its input x is float \(n, 4, 16, 16\), and an encoder takes pictures"),
        ({"shape": ("n", 3)}, {}, r"its input x is float \(n, 3\), and an encoder takes pictures"),
        ({"opset": 99}, {}, r"has opset 99, and opsets up to \d+ can be read: export it with a lower one"),
        ({"opset": onnx.defs.onnx_opset_version()}, {}, r"\(opset \d+\) cannot be loaded by ONNX Runtime"),
        ({"nodes": ()}, {}, "is not an ONNX graph: it has no nodes"),
        (
            {"nodes": [("Reshape", ["x", "one"], ["h"])], "constants": {"one": np.array([1, 768])}},
            {},
            "does not run on two pictures of 16 px at once: .* Was it exported for a batch of one",
        ),
        (
            {"nodes": [("Reshape", ["x", "one"], ["h"])], "constants": {"one": np.array([1, -1])}},
            {},
            "gives another result for a picture that is not alone: its batch size is fixed",
        ),
        (
            {"nodes": [("Log", ["x"], ["log"]), ("Sqrt", ["log"], ["nan"]), ("Flatten", ["nan"], ["h"])]},
            {},
            "gives values that are NaN or infinite",
        ),
        (
            {"nodes": [("Reshape", ["x", "s"], ["h"])], "constants": {"s": np.array([-1])}, "outputs": [("h", 1)]},
            {},
            "batch size is fixed",
        ),
        (
            {
                "nodes": [("Reshape", ["x", "s"], ["h"])],
                "constants": {"s": np.array([0, 3, 16, 4, 4])},
                "outputs": [("h", 5)],
            },
            {},
            r"its output h \(N, 3, 16, 4, 4\) is not a vector for each picture",
        ),
    ],
)
def test_a_graph_that_cannot_be_an_encoder_is_named(tmp_path, how, settings, message):
    with pytest.raises(BundleError, match=message) as error:
        wrapped(graph(tmp_path, **how), tmp_path, **settings)
    assert str(error.value).startswith(str(tmp_path / "theirs.onnx")) and "\n" not in str(error.value)
    assert not (tmp_path / "encoder").exists()


def test_files_that_are_no_graph_are_named(tmp_path):
    file = tmp_path / "theirs.onnx"
    with pytest.raises(BundleError, match="there is no such file"):
        wrapped(file, tmp_path)
    for content in (b"", b"no graph", np.random.default_rng(0).bytes(5000)):
        file.write_bytes(content)
        with pytest.raises(BundleError, match=r"theirs.onnx is not an ONNX graph"):
            wrapped(file, tmp_path)


def test_weights_in_a_file_of_their_own_are_read_and_missing_ones_are_named(tmp_path):
    file = graph(tmp_path)
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="theirs.data", size_threshold=0)
    bundle = wrapped(file, tmp_path)
    (tmp_path / "theirs.data").unlink()
    close(embedding(bundle), convolved(planes()).mean(axis=(2, 3)))
    with pytest.raises(BundleError, match=r"theirs.onnx has its weights in theirs.data, which is not next to it"):
        wrapped(file, tmp_path)


def test_two_inputs_are_refused(tmp_path):
    model = onnx.load(graph(tmp_path))
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    model.graph.node[-1].output[0] = "flat"
    model.graph.node.append(helper.make_node("Mul", ["flat", "mask"], ["h"]))
    onnx.save(model, tmp_path / "theirs.onnx")
    with pytest.raises(BundleError, match="has 2 inputs, and an encoder has one, the pictures: x, mask"):
        wrapped(tmp_path / "theirs.onnx", tmp_path)


def picture(width, height, kind="png", seed=0):
    """A picture with detail at every scale, as a file."""
    rng = np.random.default_rng(seed)
    noise = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (3, 20, 90)]
    layers = [np.asarray(Image.fromarray(n).resize((width, height), Image.Resampling.BICUBIC), float) for n in noise]
    file = io.BytesIO()
    Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(file, kind, quality=92)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")  # the exporter's own
def test_a_picture_gets_the_embedding_that_its_source_gives_it(tmp_path):
    """torchvision's network and transform, exported by torch's older exporter with an input of floats."""
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small().eval()
    network.classifier = torch.nn.Identity()
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, 96, 96),),
        tmp_path / "theirs.onnx",
        input_names=["images"],
        output_names=["features"],
        dynamic_axes={"images": {0: "n"}, "features": {0: "n"}},
        dynamo=False,
    )
    bundle = wrapped(tmp_path / "theirs.onnx", tmp_path, mean=MEAN, std=STD, crop=96 / 110, interpolation="bilinear")
    theirs = transforms.Compose(
        [transforms.Resize(110), transforms.CenterCrop(96), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    for file in (picture(300, 200), picture(97, 411, seed=1), picture(60, 50, seed=2), picture(211, 211, "jpeg", 3)):
        with torch.no_grad():
            expected = network(theirs(Image.open(io.BytesIO(file)))[None]).numpy()[0]
        (actual,) = embedding(bundle, read_pixels(file, bundle.card.preprocessing)[None])
        cosine = actual @ expected / np.linalg.norm(actual) / np.linalg.norm(expected)
        assert 1 - cosine <= 1e-4


def test_graphs_inside_a_node_and_functions_are_kept(tmp_path):
    """An If whose branches take tensors of the graph around them, and a function of the model's own."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Mul", ["mean", scale], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, 1, [None] * 4)],
        )
        for name, scale in (("then", "two"), ("else", "three"))
    }
    nodes = [
        ("Conv", ["x", "w"], ["map"]),
        ("GlobalAveragePool", ["map"], ["mean"]),
        ("If", ["condition"], ["scaled"], branches),
        ("Flat", ["scaled"], ["h"], {"domain": "theirs"}),
    ]
    constants = {"two": np.array(2, np.float32), "three": np.array(3, np.float32), "condition": np.array(False)}
    file = graph(tmp_path, nodes, constants=constants)
    model, opset = onnx.load(file), helper.make_opsetid("", 17)
    model.opset_import.append(helper.make_opsetid("theirs", 1))
    flatten = [helper.make_node("Flatten", ["a"], ["b"])]
    model.functions.append(helper.make_function("theirs", "Flat", ["a"], ["b"], flatten, [opset]))
    onnx.save(model, file)
    close(embedding(wrapped(file, tmp_path)), 3 * convolved(planes()).mean(axis=(2, 3)))
