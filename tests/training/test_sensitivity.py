"""Sensitivity of encoders that depend on one property only, the views, and the report of evaluate.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import PretrainSettings
from training.encoders import ResNetEncoder
from training.evaluate import EvaluateSettings, evaluate
from training.evaluation import sensitivity as s
from training.evaluation.sensitivity import sensitivity, views


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pixels():
    blocks = np.random.default_rng(0).integers(40, 200, (12, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)


def mean_colour(pixels):
    return torch.from_numpy(pixels.astype(np.float32).mean(axis=(1, 2))) - 120


def left_half(pixels):
    return torch.from_numpy(pixels[:, :, :8].astype(np.float32)).flatten(1) - 120


def moved(found, augmentation):
    return next(curve.moved for curve in found.curves if curve.augmentation == augmentation)


def test_an_encoder_of_the_mean_colour_is_sensitive_to_grey_and_hue_but_not_to_flips(pixels):
    found = sensitivity(mean_colour, pixels)
    assert moved(found, "flip")[0] == pytest.approx(0, abs=1e-3)
    assert moved(found, "grey")[0] > 0.3
    assert np.all(np.diff(moved(found, "hue")) > 0)


def test_an_encoder_of_the_left_half_is_sensitive_to_flips(pixels):
    found = sensitivity(left_half, pixels)
    assert moved(found, "flip")[0] == pytest.approx(1, abs=0.15)
    assert moved(found, "crop")[-1] > moved(found, "crop")[0] > moved(found, "blur")[0]


def test_the_cosine_of_others_is_the_mean_over_pairs_of_different_pictures(pixels):
    h = torch.nn.functional.normalize(left_half(pixels), dim=1)
    pairs = [float(h[i] @ h[j]) for i in range(12) for j in range(12) if i != j]
    assert sensitivity(left_half, pixels).others == pytest.approx(np.mean(pairs), abs=1e-5)


@pytest.mark.parametrize("augmentation", list(s.STRENGTHS))
def test_each_augmentation_changes_pictures_and_strength_0_does_not(pixels, augmentation):
    assert np.abs(views(pixels, augmentation, 0.0).astype(int) - pixels).max() <= 1
    strength = s.STRENGTHS[augmentation][1][-1]
    images = np.repeat(pixels, 2, axis=1).repeat(2, axis=2)  # a blur's kernel is a tenth of the side
    changed = views(images, augmentation, strength)
    assert (np.abs(changed.astype(int) - images).reshape(12, -1).max(axis=1) > 5).all()
    assert np.array_equal(changed, views(images, augmentation, strength))


def test_flip_and_grey(pixels):
    assert np.abs(views(pixels, "flip", 1.0).astype(int) - pixels[:, :, ::-1]).max() <= 1
    grey = views(pixels, "grey", 1.0)
    assert (grey == grey[..., :1]).all()


def test_a_single_picture_is_refused(pixels):
    with pytest.raises(ValueError, match="needs at least 2, not 1"):
        sensitivity(mean_colour, pixels[:1])


@pytest.mark.slow
def test_a_folder_without_labels_gets_curves_of_trained_and_untrained_encoder(pixels, tmp_path, capsys):
    (tmp_path / "heap").mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "heap" / f"{i}.png")
    torch.manual_seed(1)
    weights = {f"encoder.{name}": value for name, value in ResNetEncoder("tiny", 1, 16).state_dict().items()}
    own = PretrainSettings(size_px=16).to_dict()
    torch.save({"settings": own, "state_dict": weights, "facts": {}, "history": []}, tmp_path / "a.ckpt")
    result = evaluate(EvaluateSettings(("a.ckpt",), data="heap", sensitivity=True, out=tmp_path / "o" / "heap"))
    trained, untrained = result["sensitivity"]
    assert (trained["encoder"], untrained["encoder"]) == ("a.ckpt", "a.ckpt:random")
    assert trained["pictures"] == 12 and trained["others"] != untrained["others"]
    assert json.loads((tmp_path / "o" / "heap.json").read_text())["sensitivity"][0]["curves"][0]["cosines"]
    with Image.open(tmp_path / "o" / "heap-sensitivity.png") as picture:
        assert picture.width > 800
    printed = capsys.readouterr().out
    assert "a.ckpt notices " in printed and "another picture" in printed


@pytest.mark.slow
def test_encoders_without_a_known_architecture_have_no_untrained_counterpart(tmp_path):
    assert s.untrained("pixels", None) is None
    assert s.untrained("a.ckpt:random", None) is None
    (tmp_path / "some.onnx").touch()
    assert s.untrained("some.onnx", None) is None
    assert s.untrained("resnet18:IMAGENET1K_V1", 32).name == "torchvision:resnet18:random"
