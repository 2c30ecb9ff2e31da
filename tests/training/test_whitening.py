"""Whitening of h: what it does to the features, that a run's setting reaches it, and where it is stored and served."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from export.artifact import Preprocessing
from export.to_onnx import ExportSettings, export
from training import checkpoint, zoo
from training.config import PRESETS, PretrainSettings
from training.data.sources import open_source
from training.data.store import load_splits
from training.distil import DistilSettings, distil
from training.encoders import LEAST_VARIANCE, ResNetEncoder, embed, head_for_h, projection_head
from training.evaluation.features import onnx_session
from training.finetune import finetune, train_classifier
from training.initial import load_initial
from training.pretrain import pretrain, starting_point
from training.recipes import FinetuneSettings
from training.simclr import SimCLR
from training.study import cell

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")
PIXELS = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def encoder() -> ResNetEncoder:
    torch.manual_seed(0)
    return ResNetEncoder("tiny", 1, 16).eval()


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_each_principal_direction_is_divided_by_its_variance_to_the_power(encoder, power):
    features = embed(encoder, PIXELS).double().numpy()
    encoder.whiten(PIXELS, power)
    h = embed(encoder, PIXELS).double().numpy()
    np.testing.assert_allclose(h.mean(axis=0), 0, atol=1e-4)
    _, scales, directions = np.linalg.svd(features - features.mean(axis=0))
    variances = scales**2 / len(PIXELS)  # the first 80, since 80 pictures have no more; all others are 0
    expected = variances * (variances * 128 / variances.sum() + LEAST_VARIANCE) ** (-2 * power)
    across = directions @ np.cov(h.T, bias=True) @ directions.T
    np.testing.assert_allclose(across.diagonal()[: len(variances)], expected, rtol=1e-3, atol=1e-5 * expected.max())
    np.testing.assert_allclose(across - np.diag(across.diagonal()), 0, atol=1e-5 * expected.max())


def test_without_a_power_h_is_the_centred_features(encoder):
    features = embed(encoder, PIXELS)
    encoder.whiten(PIXELS, 0.5)
    encoder.whiten(PIXELS, 0)
    assert encoder.whitening is None
    torch.testing.assert_close(embed(encoder, PIXELS), features - features.mean(dim=0))


@pytest.mark.parametrize("pixels", [PIXELS[:1], np.zeros_like(PIXELS)], ids=["one picture", "equal pictures"])
def test_pictures_without_any_variance_give_finite_h(encoder, pixels):
    encoder.whiten(pixels, 0.25)
    assert embed(encoder, PIXELS).isfinite().all()


def test_an_encoder_with_infinite_weights_is_not_whitened(encoder):
    torch.nn.init.constant_(encoder.conv1.weight, torch.inf)
    encoder.whiten(PIXELS, 0.25)
    assert encoder.whitening is None


def test_loading_brings_the_whitening_or_removes_it(encoder):
    plain = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.whiten(PIXELS, 0.25)
    whitened = ResNetEncoder("tiny", 1, 16).eval()
    whitened.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(embed(whitened, PIXELS), embed(encoder, PIXELS), rtol=0, atol=0)
    whitened.load_state_dict(plain)
    assert whitened.whitening is None and encoder.whitening is not None


@pytest.mark.slow
def test_a_run_whitens_what_it_keeps_measures_and_exports_and_trains_without_it(small_settings, monkeypatch):
    seen, loss = [], SimCLR.loss
    monkeypatch.setattr(SimCLR, "loss", lambda self, *args: seen.append(self.encoder.whitening) or loss(self, *args))
    run = pretrain(small_settings(whiten=0.25, knn_epochs=1, ema=0.5))
    encoder = checkpoint.encoder_of(checkpoint.load(checkpoint.find(run)))
    assert encoder.whitening is not None and seen == [None] * 6
    graph = export(ExportSettings(str(run)))[0].graph
    served = onnx_session(graph).run(None, {"pixels": PIXELS})[0]
    np.testing.assert_allclose(served, embed(encoder, PIXELS), atol=1e-4 * np.abs(served).max())
    again = pretrain(small_settings(name="again", init=str(run), epochs=1, whiten=0.5, ema=0.5))
    other = checkpoint.encoder_of(checkpoint.load(checkpoint.find(again)), result=True)
    assert other.whitening is not None and not torch.equal(other.whitening, encoder.whitening)
    assert seen == [None] * 8
    plain = pretrain(small_settings(name="plain", epochs=1))
    assert checkpoint.encoder_of(checkpoint.load(checkpoint.find(plain))).whitening is None


@pytest.mark.slow
def test_a_run_with_initial_weights_whitens_as_they_do_unless_another_power_is_given(small_settings, capsys):
    run = pretrain(small_settings(name="start", whiten=0.3, epochs=1))
    tiny = PRESETS["tiny"][1]
    assert tiny.whiten == 0.25
    for init, whiten in ((f"{zoo.LITE0_ARCHITECTURE}:random", 0.0), (str(run), 0.3)):
        assert starting_point(dataclasses.replace(tiny, init=init))[0].whiten == whiten
        assert starting_point(dataclasses.replace(tiny, init=init, whiten=0.1))[0].whiten == 0.1
    assert f"this run is tiny at 16 px, whitened by 0.3, like {run}" in capsys.readouterr().out


@pytest.mark.parametrize("power", [0, 0.25])
def test_g_for_h_gives_the_z_that_training_compared(encoder, power):
    torch.manual_seed(0)
    g = projection_head(128, 2, 8).eval()
    g[0].weight.data.normal_()
    g[1].running_mean.normal_()
    features = embed(encoder, PIXELS)
    encoder.whiten(PIXELS, power)
    h = embed(encoder, PIXELS)
    with torch.no_grad():
        z = g(features)
        torch.testing.assert_close(head_for_h(g, encoder)(h), z, rtol=1e-3, atol=1e-3 * z.std().item())
        assert (g(h) - z).abs().max() > 0.1 * z.std()
    assert isinstance(head_for_h(torch.nn.Identity(), encoder), torch.nn.Identity)


@pytest.mark.slow
def test_studies_and_fine_tuning_get_g_for_h(small_settings, monkeypatch):
    settings = small_settings(whiten=0.25, epochs=1, head_layers=2, name=f"{cell.FOLDER}/same")
    run = pretrain(settings)
    start = load_initial(str(run), None, None, None, 0)
    whitened, g = start.encoder, start.projector.eval()
    features = copy.deepcopy(whitened)
    features.show_features()
    pixels = np.array(load_splits(open_source(small_settings().data), Preprocessing(16, 1.0))[0].pixels[:20])
    with torch.no_grad():
        z, hidden = g(embed(features, pixels)), g[:3](embed(features, pixels))
    seen = {}
    monkeypatch.setattr(
        "training.finetune.train_classifier",
        lambda network, *args: seen.update(first=copy.deepcopy(network).eval()) or train_classifier(network, *args),
    )
    finetune(FinetuneSettings(data=small_settings().data, init=str(run), mode="head", epochs=1, name="tuned"))
    with torch.no_grad():
        found = seen["first"].hidden(embed(seen["first"].encoder, pixels))
    torch.testing.assert_close(found, hidden, rtol=1e-3, atol=1e-3)
    monkeypatch.setitem(cell.MEASURES, "z", lambda trained: {"z": trained.h_and_z(pixels)[1].tolist()})
    monkeypatch.setattr(cell, "cell_key", lambda _: "same")
    found = cell.run_cell(settings, ("z",))["z"]
    torch.testing.assert_close(torch.tensor(found), z, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_student_keeps_the_whitening_of_its_initial_weights_and_is_centred_on_its_pictures(small_settings):
    run = pretrain(small_settings(whiten=0.25, epochs=1))
    settings = DistilSettings(teacher=str(run), init=str(run), data=small_settings().data, name="student", epochs=1)
    start, student = (
        checkpoint.encoder_of(checkpoint.load(checkpoint.find(path)), result=True) for path in (run, distil(settings))
    )
    assert torch.equal(student.whitening, start.whitening)
    pixels = load_splits(open_source(settings.data), Preprocessing(16, 1.0))[0].pixels
    h = embed(student, np.array(pixels))
    torch.testing.assert_close(h.mean(dim=0), torch.zeros(128), rtol=0, atol=1e-4)


def test_powers_above_full_whitening_are_refused():
    with pytest.raises(ValueError, match=r"--whiten must be between 0 and 0.5, not 0.6"):
        PretrainSettings(whiten=0.6)
    old = PretrainSettings().to_dict()
    del old["whiten"]
    assert PretrainSettings.from_dict(old).whiten == 0  # a run from before
