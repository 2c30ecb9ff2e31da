"""Every kind of encoder gives its own features, and names that are not encoders are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from export.artifact import BundleError
from export.to_onnx import ExportSettings, export
from training import checkpoint, zoo
from training.checkpoint import CheckpointError
from training.data.sources import open_source
from training.data.store import PixelStore
from training.encoders import embed
from training.evaluation import features
from training.evaluation.features import EncoderError, open_encoder, size_note
from training.simclr import SimCLR
from training.zoo import ZooError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def run(small_settings, tmp_path):
    """An untrained run; the tests check that its weights are loaded."""
    module = SimCLR(small_settings(seed=3), PixelStore("some", PIXELS, np.full(5, -1), [], [], [], tmp_path), None)
    with torch.no_grad():
        module.encoder.bn1.weight += 0.5
    saved = {"settings": module.settings.to_dict(), "facts": module.facts, "state_dict": module.state_dict()}
    checkpoint.AtomicCheckpointIO().save_checkpoint(saved, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_its_export_and_its_bare_graph_give_the_same_features(run, tmp_path):
    encoder = checkpoint.encoder_of(checkpoint.load(checkpoint.find(run)))
    expected = embed(encoder, PIXELS)
    bundle, _ = export(ExportSettings(str(run)))
    shutil.copy(bundle.graph, tmp_path / "alone.onnx")
    for name in (run, run / "checkpoints" / "last.ckpt", bundle.folder, bundle.graph, tmp_path / "alone.onnx"):
        extractor = open_encoder(str(name))
        assert extractor.preprocessing.size_px == 16
        torch.testing.assert_close(extractor(PIXELS), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(EncoderError, match="an exported encoder cannot be untrained"):
        open_encoder(f"{bundle.folder}:random")
    card = json.loads((bundle.folder / "model_card.json").read_text())
    card["preprocessing"]["size_px"] = 24
    (bundle.folder / "model_card.json").write_text(json.dumps(card))
    with pytest.raises(BundleError, match="takes 16 px but its card says 24"):
        open_encoder(str(bundle.folder))


def test_the_untrained_encoder_has_the_initial_weights_of_the_run(run, small_settings, tmp_path):
    fresh = SimCLR(small_settings(seed=3), PixelStore("some", PIXELS, np.full(5, -1), [], [], [], tmp_path), None)
    untrained = open_encoder(f"{run}:random")(PIXELS)
    torch.testing.assert_close(untrained, embed(fresh.encoder, PIXELS))
    assert not torch.allclose(untrained, open_encoder(str(run))(PIXELS))


@pytest.mark.slow
def test_torchvision_features_are_those_before_the_last_layer(tmp_path):
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18().eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    extractor = open_encoder(f"resnet18:{tmp_path / 'weights.pth'}", size_px=32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    seen = []
    theirs.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        theirs(normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255))
    torch.testing.assert_close(extractor(pixels), seen[0], rtol=1e-4, atol=1e-5)
    assert (extractor.preprocessing.crop, extractor.preprocessing.size_px) == (224 / 256, 32)


def test_pixel_features_are_the_pixels():
    h = open_encoder("pixels", 16)(PIXELS)
    assert h.shape == (5, 768)
    np.testing.assert_allclose(h[2], PIXELS[2].ravel() / 255 - 0.5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("resnt50", EncoderError, r"resnt50 is not a run, .*\(nearest: resnet50"),
        (
            "resnet18:best",
            ZooError,
            "resnet18:best: best is neither a file nor weights of resnet18, which are IMAGENET1K",
        ),
        ("squeezenet1_0:random", ZooError, "has no linear layer at its end"),
        ("vit_b_32:random", ZooError, "vit_b_32:random cannot take pictures of 40 px"),
    ],
)
def test_a_name_that_is_not_an_encoder_is_refused(name, error, words):
    with pytest.raises(error, match=words):
        open_encoder(name, 40)


@pytest.mark.slow
def test_files_that_are_not_encoders_are_refused(tmp_path, monkeypatch):
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ZooError, match="these weights are of another architecture"):
        open_encoder(f"resnet18:{tmp_path / 'other.pth'}")
    with pytest.raises(CheckpointError, match=r"other\.pth is not a checkpoint of training/pretrain\.py"):
        open_encoder(str(tmp_path / "other.pth"))
    (tmp_path / "halfway.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"halfway\.ckpt is from an unfinished run: finish it with --resume"):
        open_encoder(str(tmp_path / "halfway.ckpt"))
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"bad\.onnx does not run"):
        open_encoder(str(tmp_path / "bad.onnx"))
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        open_encoder(str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(
        ZooError,
        match=r"cannot be downloaded; is there a network\? You can also give a file: torchvision:resnet18:FI",
    ):
        zoo.load("resnet18")


def test_features_that_are_nan_are_reported_with_the_picture():
    def encode(batch):
        return torch.from_numpy(batch[:, 0, 0].astype(np.float32)).log()

    pixels = np.full((4, 2, 2, 3), 9, np.uint8)
    pixels[2] = 0
    extractor = features.Extractor("logarithm", features.Preprocessing(2), encode)
    with pytest.raises(EncoderError, match=r"logarithm gives values that are NaN or infinite for c\.png"):
        extractor(pixels, ["a.png", "b.png", "c.png", "d.png"])


def test_a_note_is_given_for_pictures_much_smaller_than_the_encoders_input(tmp_path):
    for i in range(3):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    pictures = open_source(str(tmp_path)).pictures
    assert size_note("resnet50", 59, pictures) == ""
    assert "resnet50 takes 60 px and these pictures have 30" in size_note("resnet50", 60, pictures)
