"""Settings that adapt an encoder that others trained, the centre of h, and the precision on a CPU."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.layers import SyncBatchNormAct
from torch import nn

from training import checkpoint, zoo
from training.config import PRESETS, PretrainSettings
from training.data import store
from training.data.sources import open_source
from training.device import bfloat16_pays
from training.encoders import ResNetEncoder, embed
from training.pretrain import fit, pretrain
from training.simclr import SimCLR

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


@pytest.fixture
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(run) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.find(run))["state_dict"]


def changed(before: dict, after: dict, prefix: str, kind: type = nn.Parameter) -> bool:
    names = {name for name, _ in ResNetEncoder("tiny", 1, 16).named_parameters()}
    keys = [key for key in before if key.startswith(prefix) and (prefix != "encoder." or key[8:] in names)]
    assert keys
    return any(not torch.equal(before[key], after[key]) for key in keys)


@pytest.mark.slow
def test_only_the_head_is_trained_in_the_first_steps(small_settings):
    fresh = SimCLR(small_settings(), *splits(small_settings()))
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    head_only = weights(pretrain(small_settings(name="head", epochs=1, head_first=2, warmup=0.0)))
    assert not changed(before, head_only, "encoder.") and changed(before, head_only, "projector.")
    both = weights(pretrain(small_settings(name="both", epochs=1, head_first=1, warmup=0.0)))
    assert changed(before, both, "encoder.")


@pytest.mark.slow
def test_the_preset_adapts_to_few_pictures_in_more_epochs(small_shapes):
    settings = replace(PRESETS["adapt"][1], init="timm:test_resnet:random", size_px=32, max_steps=1)
    run = pretrain(replace(settings, data=str(small_shapes), name="few"))
    assert json.loads((run / "config.json").read_text())["epochs"] == 26  # of 2 steps, 24 of them for the head alone


def splits(settings: PretrainSettings):
    return store.load_splits(open_source(settings.data), settings.preprocessing)


@pytest.mark.slow
def test_frozen_statistics_are_those_of_the_initial_weights_and_the_weights_are_trained(small_settings):
    earlier = pretrain(small_settings(name="earlier", epochs=1))
    start, name = weights(earlier), "encoder.bn1.running_mean"
    frozen = weights(pretrain(small_settings(name="frozen", init=str(earlier), epochs=1, freeze_statistics=True)))
    assert torch.equal(frozen[name], start[name]) and changed(start, frozen, "encoder.")
    usual = weights(pretrain(small_settings(name="usual", init=str(earlier), epochs=1)))
    assert not torch.equal(usual[name], start[name])


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_the_encoder_has_a_learning_rate_of_its_own(small_settings, optimizer):
    settings = small_settings(lr=0.1, lr_scaling="none", encoder_lr=0.05, optimizer=optimizer)
    module = SimCLR(settings, *splits(settings))
    groups = module.configure_optimizers()["optimizer"].param_groups
    rates = {id(weight): group["initial_lr"] for group in groups for weight in group["params"]}
    assert {round(rates[id(weight)], 9) for weight in module.encoder.parameters()} == {0.005}
    assert {rates[id(w)] for w in module.projector.parameters() if w.requires_grad} == {0.1}


@pytest.mark.slow
def test_h_of_a_trained_run_has_mean_zero_over_its_pictures_and_training_does_not_see_the_centre(
    small_settings, monkeypatch
):
    seen, loss = [], SimCLR.loss
    monkeypatch.setattr(
        SimCLR, "loss", lambda self, *args: seen.append(self.encoder.centre.clone()) or loss(self, *args)
    )
    settings = small_settings(knn_epochs=1)
    encoder = checkpoint.encoder_of(checkpoint.load(checkpoint.find(pretrain(settings))))
    assert encoder.centre.abs().max() > 0.01
    h = embed(encoder, np.array(splits(settings)[0].pixels))
    torch.testing.assert_close(h.mean(dim=0), torch.zeros(128), rtol=0, atol=1e-5)
    assert len(seen) == 6 and all(not centre.any() for centre in seen)


def test_a_checkpoint_from_before_the_centre_and_the_crop_is_read_as_it_was(small_settings):
    old = small_settings().to_dict()
    del old["crop"]
    assert PretrainSettings.from_dict(old).preprocessing.crop is None
    encoder = ResNetEncoder("tiny", 1, 16)
    state = {key: value for key, value in encoder.state_dict().items() if key != "centre"}
    encoder.load_state_dict(state)
    assert not encoder.centre.any()


@pytest.mark.parametrize(
    ("capabilities", "architecture", "pays"),
    [
        ({"amx_bf16": True}, "tiny", True),
        ({"avx512_bf16": True}, "tiny", True),
        ({"avx2": True}, "tiny", False),
        ({"amx_bf16": True}, zoo.LITE0_ARCHITECTURE, False),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="for runs on a CPU")
@pytest.mark.slow
def test_a_cpu_trains_in_bfloat16_where_that_is_faster(
    small_settings, tmp_path, monkeypatch, capabilities, architecture, pays
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    settings = small_settings(encoder=architecture, max_steps=1)
    module = SimCLR(settings, *splits(settings))
    assert bfloat16_pays(torch.device("cpu"), module) == pays
    precisions, loss = [], SimCLR.loss
    monkeypatch.setattr(
        SimCLR, "loss", lambda self, *args: precisions.append(torch.is_autocast_enabled("cpu")) or loss(self, *args)
    )
    fit(module, tmp_path / "run", False, 1, 1)
    assert precisions == [pays]


@pytest.mark.slow
def test_synchronised_batch_norms_of_timm_keep_their_activation():
    encoder = zoo.load("lite0", 64).encoder
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(x)
        synchronised = zoo.synchronised(encoder).eval()
        assert any(isinstance(module, SyncBatchNormAct) for module in synchronised.modules())
        torch.testing.assert_close(synchronised(x), expected)
    assert np.isfinite(expected.numpy()).all()


@pytest.mark.slow
def test_a_trial_that_is_continued_has_no_verdict_until_its_end(small_settings, monkeypatch):
    earlier = pretrain(small_settings(name="earlier", epochs=1))
    settings = small_settings(name="trial", init=str(earlier), epochs=4)
    path = checkpoint.find(pretrain(replace(settings, max_steps=1)))
    results = {"verdict", "after", "epochs"}
    pretrain(replace(settings, max_steps=1, resume=True))  # there is nothing to continue
    assert results <= checkpoint.load(path)["facts"].keys()
    loss = SimCLR.loss

    def fails_in_the_third_epoch(self, *args):
        if self.current_epoch == 2:
            raise RuntimeError("power cut")
        return loss(self, *args)

    monkeypatch.setattr(SimCLR, "loss", fails_in_the_third_epoch)
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(replace(settings, resume=True))
    saved = checkpoint.load(path)
    assert len(saved["history"]) == 2 and not results & saved["facts"].keys()
