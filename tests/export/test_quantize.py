"""Quantised bundles: their card, their losses, and the service that loads them."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
import torchvision
from PIL import Image

from export import quantize as quantizing
from export.artifact import BundleError, load_bundle, record_measured, save_bundle
from export.quantize import QuantizeSettings, quantize, to_int8
from export.to_onnx import ExportSettings, export, to_graph
from serving.inference.encoder import OnnxEncoder
from training import classifier
from training.classifier import Classifier
from training.config import PretrainSettings
from training.encoders import ResNetEncoder

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")  # the exporter's own


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A classifier's bundle. Every block of its encoder has an effect."""
    torch.manual_seed(0)
    network = Classifier(ResNetEncoder("tiny", 1, 20), None, 3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.uniform_(-0.2, 0.2)
    torch.nn.init.normal_(network.classifier.weight)
    settings = PretrainSettings(size_px=20)
    facts = {"data": "pictures", "images": 9, "epochs": 2, "commit": "abc", "after": {"held_out": 0.5}}
    about = {"classes": ["a", "b", "c"], "origin": "random weights", "settings": {}}
    run = tmp_path_factory.mktemp("runs") / "small"
    classifier.save(run / "checkpoints" / "last.ckpt", network, settings, facts, [], about)
    bundle = export(ExportSettings(str(run)))[0]
    record_measured(bundle.folder, {"data": "pictures", "knn": 0.5, "k": 1, "queries": 3, "bank": 9})
    return bundle


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty pictures of each of two colours, in folders named by colour."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, base in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / name).mkdir()
        for i in range(40):
            noise = rng.integers(-30, 30, (20, 20, 3)) + rng.integers(-30, 30, (4, 4, 3)).repeat(5, 0).repeat(5, 1)
            Image.fromarray((np.array(base) + noise).clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module", params=["int8", "fp16"])
def made(request, bundle, pictures, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        return quantize(QuantizeSettings(bundle.folder, request.param, str(pictures)))


@pytest.mark.slow
def test_the_new_bundle_is_next_to_the_old_one_and_records_its_losses(made, bundle):
    card, found = load_bundle(made.folder).card, made.card.figures["quantized"]
    assert made.folder == bundle.folder.with_name(f"encoder-{card.precision}")
    assert card.id.startswith(f"tiny-{card.precision}-") and card.id != bundle.card.id
    assert (card.classes, card.dimension) == (["a", "b", "c"], 128)
    assert card.training["checkpoint_sha256"] == bundle.card.training["checkpoint_sha256"]
    assert found["of"] == bundle.card.id
    assert found["bytes"] == made.graph.stat().st_size < 0.6 * found["bytes_original"]
    assert found["bytes_original"] == bundle.graph.stat().st_size
    assert found["images_per_s"] > 0 and found["images_per_s_original"] > 0
    assert found["pictures"] + found["asked"] == 80
    assert found["knn_original"] - found["knn"] == found["knn_loss"] <= quantizing.LOSS_LIMIT
    assert found["neighbours_kept"] > 0.5 and found["mean_cosine"] > 0.98 and found["same_class"] > 0.9
    assert not {"parity_error", "measured"} & set(card.figures) and card.figures["after"] == {"held_out": 0.5}


@pytest.mark.slow
def test_the_service_loads_it_and_gives_nearly_the_same_vectors(made, bundle):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    before, now = OnnxEncoder(bundle).rows(pixels), OnnxEncoder(made).rows(pixels)
    assert now.dtype == np.float32 and now.shape == before.shape == (5, 131)
    assert not np.array_equal(now, before)
    for some in (slice(128), slice(128, None)):  # h, logits
        assert np.abs(now[:, some] - before[:, some]).max() < 0.1 * np.abs(before[:, some]).max()


@pytest.mark.slow
def test_the_convolutions_are_int8_and_the_head_is_not(bundle):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
    counts = []
    for in_float in ("none", *quantizing.FLOAT):
        graph = onnx.load_from_string(to_int8(bundle.graph.read_bytes(), pixels, in_float)).graph
        makers = {output: node.op_type for node in graph.node for output in node.output}
        weights = {kind: [node.input[1] for node in graph.node if node.op_type == kind] for kind in ("Conv", "Gemm")}
        counts.append(sum(makers.get(name) == "DequantizeLinear" for name in weights["Conv"]))
        assert len(weights["Gemm"]) == 1 and weights["Gemm"][0] not in makers
    assert counts == [12, 11, 8]


@pytest.mark.slow
def test_the_whitening_of_h_stays_float32_and_is_not_counted_as_a_layer():
    torch.manual_seed(0)
    encoder = ResNetEncoder("tiny", 1, 20).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 20, 20, 3), dtype=np.uint8)
    encoder.whiten(pixels, 0.25)
    whole, counts = to_graph(encoder, 20), []
    for in_float in ("none", *quantizing.FLOAT):
        graph = onnx.load_from_string(to_int8(whole, pixels, in_float)).graph
        makers = {output: node.op_type for node in graph.node for output in node.output}
        (product,) = (node for node in graph.node if node.op_type in ("MatMul", "Gemm"))
        assert all(makers.get(name) != "DequantizeLinear" for name in product.input)
        counts.append(
            sum(makers.get(node.input[1]) == "DequantizeLinear" for node in graph.node if node.op_type == "Conv")
        )
    assert counts == [12, 11, 8]


@pytest.mark.slow
def test_layers_stay_float32_until_the_loss_is_small_enough(bundle, monkeypatch, capsys):
    monkeypatch.setattr(quantizing, "to_int8", lambda graph, pixels, in_float: in_float.encode())
    losses = {b"none": 0.02, b"first": 0.004, b"first and last stage": 0.0}
    found = quantizing.to_int8_within(b"", None, lambda made: {"knn_loss": losses[made]})
    assert found[1] == "first"
    losses[b"first"] = losses[b"first and last stage"] = 0.03
    assert quantizing.to_int8_within(b"", None, lambda made: {"knn_loss": losses[made]})[1] == "none"
    assert "kNN accuracy falls by 2.0% with these layers in float32: none" in capsys.readouterr().out
    kept = {b"none": 0.6, b"first": 0.8, b"first and last stage": 0.95}  # without labels
    found = quantizing.to_int8_within(b"", None, lambda made: {"neighbours_kept": kept[made]})
    assert found[1] == "first and last stage"
    assert "60.0% of neighbours stay the same with these layers in float32: none" in capsys.readouterr().out


@pytest.mark.slow
def test_without_labels_the_loss_is_measured_by_neighbours(bundle, pictures, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in pictures.glob("*/*.png"):
        (mixed / f"{file.parent.name}{file.name}").write_bytes(file.read_bytes())
    made = quantize(QuantizeSettings(bundle.folder, "fp16", str(mixed), out=tmp_path / "new"))
    found = made.card.figures["quantized"]
    assert made.folder == tmp_path / "new"
    assert found["pictures"] == 80 and found["neighbours_kept"] > 0.9 and "knn" not in found


@pytest.mark.slow
def test_the_knn_queries_do_not_calibrate(bundle, pictures, tmp_path, monkeypatch):
    seen = []

    def to_int8_within(graph, pixels, compare):
        seen.append({p.tobytes() for p in pixels} & {p.tobytes() for p in compare.query_pixels[compare.queries]})
        return graph, "none", compare(graph)

    monkeypatch.setattr(quantizing, "to_int8_within", to_int8_within)
    quantize(QuantizeSettings(bundle.folder, "int8", str(pictures), out=tmp_path / "new"))
    assert seen == [set()]


@pytest.mark.slow
def test_a_quantised_bundle_is_refused(made, pictures):
    with pytest.raises(BundleError, match=r"encoder-\w+ is already (int8|fp16): give the bundle that it was made from"):
        quantize(QuantizeSettings(made.folder, "int8", str(pictures)))


def test_a_folder_that_cannot_be_written_is_refused_before_pictures_are_compared(
    bundle, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr("export.quantize.GraphComparison", lambda *_: pytest.fail("pictures were compared"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="file/made cannot be written"):
        quantize(QuantizeSettings(bundle.folder, data=str(pictures), out=tmp_path / "file" / "made"))


def test_a_card_of_an_unknown_precision_is_not_read(bundle, tmp_path):
    copy = save_bundle(tmp_path / "encoder", bundle.graph.read_bytes(), bundle.card)
    card = copy.folder / "model_card.json"
    card.write_text(card.read_text().replace('"fp32"', '"int4"'))
    with pytest.raises(BundleError, match="precision must be one of fp32, fp16, int8, not 'int4'"):
        load_bundle(copy.folder)


@pytest.mark.slow
def test_sums_fit_into_the_16_bits_of_a_processor_without_vnni(bundle):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
    graph = onnx.load_from_string(to_int8(bundle.graph.read_bytes(), pixels)).graph
    weights = [onnx.numpy_helper.to_array(one) for one in graph.initializer if one.data_type == onnx.TensorProto.INT8]
    largest = max(int(np.abs(one.astype(int)).max()) for one in weights if one.ndim == 4)
    assert largest >= 60 and 2 * 255 * largest < 2**15


@pytest.mark.slow
def test_an_int8_graph_that_saturates_is_not_served(made, tmp_path):
    """As on a processor without VNNI, where sums overflow."""
    wrong = [1.1 * value for value in made.card.probe]
    copy = save_bundle(tmp_path / "encoder", made.graph.read_bytes(), dataclasses.replace(made.card, probe=wrong))
    with pytest.raises(BundleError, match=r"differs by .* from its output at the export"):
        OnnxEncoder(copy)


@pytest.fixture(scope="module", params=["transformer", "of another project"])
def other(request, tmp_path_factory):
    """Encoders of others: one without a pooling, and a graph of an old opset with another kind of pooling."""
    folder = tmp_path_factory.mktemp("others")
    source = "timm:test_vit:random"
    if request.param != "transformer":
        torch.manual_seed(0)
        network = torchvision.models.shufflenet_v2_x0_5().eval()
        network.mean, network.fc = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Identity()
        source = str(folder / "theirs.onnx")
        sizes = {"x": {0: "n"}, "h": {0: "n"}}
        torch.onnx.export(
            network, (torch.zeros(1, 3, 64, 64),), source, input_names=["x"], output_names=["h"], dynamic_axes=sizes,
            dynamo=False, opset_version=11,
        )  # fmt: skip
    return export(ExportSettings(source, out=folder / "encoder"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["int8", "fp16"])
def test_encoders_of_others_are_quantised_and_served(other, pictures, tmp_path, to):
    made = quantize(QuantizeSettings(other.folder, to, str(pictures), out=tmp_path / "new"))
    side = other.card.preprocessing.size_px
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    before, now = OnnxEncoder(other)(pixels), OnnxEncoder(made)(pixels)
    cosine = (before * now).sum(axis=1) / np.linalg.norm(before, axis=1) / np.linalg.norm(now, axis=1)
    assert not np.array_equal(now, before) and cosine.min() > 0.97
    assert (made.card.licence, made.card.training) == (other.card.licence, other.card.training)
    if to == "int8":
        kinds = [node.op_type for node in onnx.load(made.graph).graph.node]
        assert kinds.count("DequantizeLinear") > kinds.count("Conv") + kinds.count("Gemm")
