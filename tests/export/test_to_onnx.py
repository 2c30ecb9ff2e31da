"""Exported bundles: f alone, with torch's values, and a correct card."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from export import quantize, to_onnx
from export.artifact import (
    CARD,
    BundleError,
    Preprocessing,
    load_bundle,
    probe_pixels,
    read_pixels,
    refuse_unwritable,
    save_bundle,
)
from export.sample import sample
from export.to_onnx import ExportSettings, export
from training import checkpoint, classifier
from training.augment import AugmentSettings
from training.checkpoint import AtomicCheckpointIO, CheckpointError
from training.classifier import Classifier
from training.config import PretrainSettings
from training.data.sources import DataError
from training.encoders import ResNetEncoder, projection_head
from training.zoo import ZooError

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")  # the exporter's own

SETTINGS = PretrainSettings(
    data="/home/somebody/pictures", encoder="tiny", size_px=20, augment=AugmentSettings(crop_area=(0.2, 1.0))
)


@pytest.fixture(scope="module")
def trained():
    """f and g with statistics and gains as after training, so that every block and batch norm has an effect."""
    torch.manual_seed(0)
    encoder = ResNetEncoder("tiny", 1, SETTINGS.size_px)
    head = projection_head(encoder.dimension, 3, 128)
    for module in (*encoder.modules(), *head.modules()):
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return encoder.eval(), head


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    encoder, head = trained
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    weights |= {f"projector.{name}": value for name, value in head.state_dict().items()}
    folder = tmp_path_factory.mktemp("runs") / "small"
    facts = {"data": "pictures", "images": 64, "epochs": 3, "commit": "abc", "before": {}, "after": {"knn": 0.5}}
    saved = {"state_dict": weights, "settings": SETTINGS.to_dict(), "facts": facts, "history": []}
    AtomicCheckpointIO().save_checkpoint(saved, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def bundle(run):
    made, fresh = export(ExportSettings(str(run)))
    assert fresh
    return made


def torchs(encoder, pixels):
    with torch.no_grad():
        return encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 8, 33])
def test_the_graph_gives_torchs_embeddings_at_any_batch_size(bundle, trained, n):
    pixels = np.random.default_rng(n).integers(0, 256, (n, 20, 20, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(bundle.graph, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(["embedding"], {"pixels": pixels})
    assert (embedding.dtype, embedding.shape) == (np.float32, (n, 128))
    expected = torchs(trained[0], pixels)
    assert np.abs(embedding - expected).max() < 1e-5 * np.abs(expected).max()


def test_no_weight_of_the_projection_head_is_in_the_file(bundle, trained):
    encoder, head = trained
    graph = onnx.load(bundle.graph).graph
    stored = [onnx.numpy_helper.to_array(weight) for weight in graph.initializer]
    floats = sum(weight.size for weight in stored if weight.dtype == np.float32)
    kernels = sum(p.numel() for p in encoder.parameters() if p.ndim > 1)
    assert kernels <= floats <= sum(p.numel() for p in encoder.parameters())  # batch norms are folded into kernels
    for weight in head.parameters():
        if weight.ndim > 1:
            values = weight.detach().numpy()
            assert not any(values.shape == other.shape and np.allclose(values, other) for other in stored)
            assert not any(values.T.shape == other.shape and np.allclose(values.T, other) for other in stored)
            assert values.ravel()[:16].tobytes() not in bundle.graph.read_bytes()


def test_the_card_describes_the_bundle(bundle, trained):
    card = load_bundle(bundle.folder).card
    assert card.sha256 == hashlib.sha256(bundle.graph.read_bytes()).hexdigest()
    assert (card.architecture, card.dimension, card.preprocessing.size_px) == ("tiny", 128, 20)
    assert card.id.startswith("tiny-")
    assert card.figures["parity_error"] < 1e-5
    assert card.figures["after"] == {"knn": 0.5}
    seen = torchs(trained[0], probe_pixels(20))[0]
    np.testing.assert_allclose(card.probe, seen.reshape(16, 8).mean(axis=1), atol=1e-5 * seen.max())
    assert (card.training["images"], card.training["epochs"], card.training["commit"]) == (64, 3, "abc")


@pytest.mark.parametrize(
    ("matryoshka", "more", "lengths"),
    [
        (True, {}, [64, 32, 16]),
        (False, {}, []),
        (True, {"distillation": {"origin": "it", "settings": {"teacher": "another"}}}, []),
        (True, {"verdict": {"better": False, "sentence": "worse than it was"}}, []),
    ],
    ids=["trained", "trained without it", "a student", "exported as it started"],
)
def test_the_card_says_to_which_lengths_embeddings_may_be_cut(
    run, bundle, tmp_path, monkeypatch, matryoshka, more, lengths
):
    saved = checkpoint.load(checkpoint.find(run))
    saved["settings"]["matryoshka"] = matryoshka
    if "verdict" in more:
        saved["facts"] |= more | {"origin": "it"}
        saved["start"] = checkpoint.encoder_of(saved).state_dict()
    AtomicCheckpointIO().save_checkpoint(saved | more, tmp_path / "checkpoints" / "last.ckpt")
    monkeypatch.setattr(to_onnx, "to_graph", lambda *_: bundle.graph.read_bytes())
    made, _ = export(ExportSettings(str(tmp_path)))
    assert load_bundle(made.folder).card.shortened == lengths


def test_the_bundle_contains_no_path_of_the_machine_that_made_it(bundle):
    files = list(bundle.folder.iterdir())
    assert len(files) >= 2  # graph and card
    for file in files:
        content = file.read_bytes()
        assert b"somebody" not in content
        assert b"encoders.py" not in content


@pytest.mark.slow
def test_the_same_checkpoint_is_not_exported_twice_and_gives_the_same_bytes_elsewhere(run, bundle, tmp_path):
    again, fresh = export(ExportSettings(str(run)))
    assert not fresh
    assert (again.card.id, again.card.sha256) == (bundle.card.id, bundle.card.sha256)
    elsewhere, fresh = export(ExportSettings(str(run / "checkpoints" / "last.ckpt"), out=tmp_path / "encoder"))
    assert fresh
    assert elsewhere.graph.read_bytes() == bundle.graph.read_bytes()


@pytest.mark.slow
def test_a_graph_that_differs_from_torch_is_not_saved(run, tmp_path, monkeypatch, trained):
    other = to_onnx.to_graph(ResNetEncoder("tiny", 1, 20).eval(), 20)
    monkeypatch.setattr(to_onnx, "to_graph", lambda encoder, size_px, head: other)
    with pytest.raises(BundleError, match=r"last\.ckpt: ONNX Runtime differs by .*; not exported"):
        export(ExportSettings(str(run), out=tmp_path / "encoder"))
    assert not (tmp_path / "encoder").exists()


@pytest.fixture(scope="module", params=[False, True], ids=["linear", "with the head's first layer"])
def adapted(request, trained, tmp_path_factory):
    """A fine-tuned run's folder, and its network."""
    encoder, head = trained
    network = Classifier(encoder, head[:3] if request.param else None, 3).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(network.classifier.weight)
    torch.nn.init.normal_(network.classifier.bias)
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    facts = {"data": "pictures", "images": 9, "epochs": 2, "commit": "abc", "after": {"held_out": 0.5}}
    how = {"data": "/home/somebody/labelled", "init": "/home/somebody/runs/a", "lr": 0.2}
    about = {"classes": ["cat", "dog", "Kuh"], "origin": "/home/somebody/runs/a", "settings": how}
    classifier.save(folder / "checkpoints" / "last.ckpt", network, SETTINGS, facts, [], about)
    return folder, network


@pytest.mark.slow
def test_a_classifiers_graph_gives_torchs_embeddings_and_logits(adapted):
    folder, network = adapted
    made, fresh = export(ExportSettings(str(folder)))
    assert fresh and not export(ExportSettings(str(folder)))[1]
    session = onnxruntime.InferenceSession(made.graph, providers=["CPUExecutionProvider"])
    for n in (1, 5):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 20, 20, 3), dtype=np.uint8)
        embedding, logits = session.run(["embedding", "logits"], {"pixels": pixels})
        for given, expected in ((embedding, torchs(network.encoder, pixels)), (logits, torchs(network, pixels))):
            assert given.dtype == np.float32
            assert np.abs(given - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_a_classifiers_card_has_its_classes_in_order_and_no_path(adapted):
    bundle, _ = export(ExportSettings(str(adapted[0])))
    assert bundle.card.classes == ["cat", "dog", "Kuh"]
    assert bundle.card.figures["after"] == {"held_out": 0.5}
    assert bundle.card.training["finetuning"] == {"lr": 0.2} and bundle.card.training["origin"] == "a"
    assert all(b"somebody" not in file.read_bytes() for file in bundle.folder.iterdir())


@pytest.mark.slow
def test_an_export_from_before_its_run_had_classes_is_made_again(adapted, monkeypatch):
    bundle, _ = export(ExportSettings(str(adapted[0])))
    graph = bundle.graph.read_bytes()
    save_bundle(bundle.folder, graph, dataclasses.replace(bundle.card, classes=[]))
    monkeypatch.setattr(to_onnx, "to_graph", lambda encoder, size_px, head: graph)
    again, fresh = export(ExportSettings(str(adapted[0])))
    assert fresh and again.card.classes == ["cat", "dog", "Kuh"]


@pytest.mark.slow
def test_logits_that_differ_from_torchs_are_found(adapted):
    graph, other = export(ExportSettings(str(adapted[0])))[0].graph.read_bytes(), torch.nn.Linear(128, 3)
    assert to_onnx.parity_error(graph, adapted[1].encoder, 20, other) > to_onnx.PARITY_LIMIT


def test_a_run_without_a_checkpoint_is_named(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty contains no checkpoint; train one"):
        export(ExportSettings(str(tmp_path / "empty")))
    (tmp_path / "lite0").mkdir()
    (tmp_path / "lite0" / CARD).write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="lite0 is the folder of an exported encoder, not a run"):
        export(ExportSettings("lite0"))
    with pytest.raises(ZooError, match=r"litte0 is not a run, a checkpoint, an ONNX file.*\(nearest: lite0"):
        export(ExportSettings("litte0"))


@pytest.mark.slow
def test_an_export_centred_on_pictures_has_mean_zero_over_them(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"none")
    settings = ExportSettings("timm:test_resnet:random", size_px=32, centre_on=str(tmp_path / "pictures"))
    made, again, plain = (
        export(dataclasses.replace(settings, out=tmp_path / name, **change))[0]
        for name, change in (("a", {}), ("b", {}), ("c", {"centre_on": ""}))
    )
    assert made.graph.read_bytes() == again.graph.read_bytes() and made.card.id != plain.card.id
    assert made.card.training == {"origin": "random weights of test_resnet", "centred_on": "pictures"}
    measured = made.card.figures["measured"]
    assert measured == {"data": "pictures", "found_first": measured["found_first"], "judged": 5}
    assert "measured" not in plain.card.figures
    files = sorted((tmp_path / "pictures").glob("?.png"))
    pixels = np.stack([read_pixels(file.read_bytes(), made.card.preprocessing) for file in files])
    h, uncentred = (
        onnxruntime.InferenceSession(bundle.graph, providers=["CPUExecutionProvider"]).run(None, {"pixels": pixels})[0]
        for bundle in (made, plain)
    )
    np.testing.assert_allclose(h, uncentred - uncentred.mean(axis=0), atol=1e-4 * np.abs(uncentred).max())
    for file in files:
        file.unlink()
    with pytest.raises(DataError, match="has no picture that can be read"):
        export(settings)


def colour(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.mean(axis=(1, 2), dtype=np.float32))


def test_an_export_on_pictures_with_labels_measures_how_many_are_told_by_their_nearest(tmp_path):
    rng = np.random.default_rng(0)
    for label, light in (("dark", 0), ("bright", 200)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(light, light + 50, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.png")
    found = sample(str(tmp_path / "pictures"), Preprocessing(8), colour)
    assert found.measured == {"data": "pictures", "knn": 1.0, "k": 1, "queries": 4, "bank": 16}
    assert found.centre.numpy() == pytest.approx([124.5] * 3, abs=2)
    blind = sample(str(tmp_path / "pictures"), Preprocessing(8), lambda pixels: torch.ones(len(pixels), 3))
    assert blind.measured["knn"] < 1


@pytest.mark.parametrize("labels", ["", "one", "each its own"])
def test_an_export_on_pictures_without_usable_labels_measures_how_many_are_found_again(tmp_path, labels):
    for i in range(3):
        folder = tmp_path / "pictures" / {"": "", "one": "a"}.get(labels, str(i))
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), ("red", "lime", "blue")[i]).save(folder / f"{i}.png")
    measured = sample(str(tmp_path / "pictures"), Preprocessing(8), colour).measured
    assert measured == {"data": "pictures", "found_first": 1.0, "judged": 3}
    for file in sorted(tmp_path.rglob("*.png"))[1:]:
        file.unlink()
    assert sample(str(tmp_path / "pictures"), Preprocessing(8), colour).measured == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["litte0"], "error: litte0 is not a run, a checkpoint, an ONNX file, or a network of timm or torchvision"),
        (
            ["lite0", "--mean", "0", "0", "1"],
            "error: --mean is for ONNX files; lite0 says itself how it takes",
        ),
        (["lite0", "--pooling", "mean"], "error: --pooling is for ONNX files; lite0 says itself"),
        (["torchvision:vit_b_32:random", "--size-px", "100"], "cannot take pictures of 100 px"),
        (["none.onnx"], "error: none.onnx: there is no such file"),
        (["folder.onnx"], "error: folder.onnx: there is no such file"),
        (["timm:test_resnet:random", "--centre-on", "nowhere"], "error: there is no folder or file nowhere"),
    ],
)
def test_the_command_answers_bad_input_in_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.setattr("sys.argv", ["to_onnx.py", *arguments])
    with pytest.raises(SystemExit) as end:
        to_onnx.main()
    said = f"{end.value.code}"
    assert message in said and "\n" not in said


@pytest.mark.parametrize("kind", ["run", "others", "graph"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_exported(kind, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for work in ("to_graph", "read_graph"):
        monkeypatch.setattr(to_onnx, work, lambda *_: pytest.fail("it was exported"))
    source = {"run": str(run), "others": "timm:test_resnet:random", "graph": str(tmp_path / "theirs.onnx")}[kind]
    sentence = f"{tmp_path}/file/made cannot be written: {tmp_path}/file is a file; name another folder with --out"
    with pytest.raises(BundleError, match=sentence):
        export(ExportSettings(source, out=tmp_path / "file" / "made"))


def test_without_permission_to_write_the_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(BundleError, match=f"there is no permission to write in {tmp_path}; name another folder"):
        refuse_unwritable(tmp_path / "new" / "encoder")
    (tmp_path / "new").mkdir()
    refuse_unwritable(tmp_path / "new" / "encoder")


def test_settings_that_make_no_sense_are_named():
    for change, message in (
        ({"size_px": 0}, "--size-px must be at least 1, not 0"),
        ({"std": (0.0, 1.0, 1.0)}, r"--std must be above 0, not \(0.0, 1.0, 1.0\)"),
        ({"crop": 2.0}, r"--crop must be in \(0, 1\] or None, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ExportSettings("theirs.onnx", **change)


def test_settings_of_a_wider_encoder_name_it():
    assert dataclasses.replace(SETTINGS, encoder="resnet50", width=2).architecture == "resnet50-2x"


@pytest.mark.parametrize(("command", "function"), [(to_onnx, "export"), (quantize, "quantize")])
def test_ctrl_c_ends_with_a_sentence(monkeypatch, capsys, command, function):
    def stopped(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, function, stopped)
    monkeypatch.setattr("sys.argv", ["command", "runs/some"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 130 and "Stopped. Nothing was exported." in capsys.readouterr().out
