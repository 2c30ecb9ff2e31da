"""Small whole runs: the files they write, resuming after a kill, and settings that are refused."""

import csv
import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.plugins.precision import MixedPrecision
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.training.conftest import RandomPictures
from training import checkpoint, report
from training.augment import AugmentSettings, render
from training.average import Average
from training.checkpoint import CheckpointError
from training.config import PRESETS, PretrainSettings, parse
from training.data.sources import DataError, open_source
from training.encoders import ResNetEncoder, to_input
from training.initial import InitialWeights, apply_initial, load_initial, statistics_mismatch
from training.lars import lars_groups
from training.loss import LOSSES
from training.optimizers import OPTIMIZERS
from training.pretrain import check_batch, enough_epochs, pretrain, starting_point, widen_crops
from training.simclr import SimCLR, compiles_networks

ROOT = Path(__file__).parents[2]

# A run in a process of its own, with a checkpoint after every epoch however short. With a class, a method and a number
# behind the settings it is killed after that call of the method.
SCRIPT = """
import itertools, json, os, signal, sys
from training import checkpoint, pretrain
from training.config import PretrainSettings
checkpoint.EVERY_S = 0.0
if sys.argv[2:]:
    owner, name, last = getattr(pretrain, sys.argv[2]), sys.argv[3], int(sys.argv[4])
    method, calls = getattr(owner, name), itertools.count(1)
    def then_killed(*arguments):
        result = method(*arguments)
        return result if next(calls) < last else os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, then_killed)
pretrain.pretrain(PretrainSettings.from_dict(json.loads(sys.argv[1])))
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_in_process(settings: PretrainSettings, folder: Path, *killed_after: str) -> int:
    """Its exit status."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(settings.to_dict()), *killed_after]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode


@pytest.mark.slow
def test_a_run_writes_its_settings_its_metrics_a_checkpoint_and_a_report(small_settings, capsys):
    run = pretrain(small_settings(knn_epochs=2))
    assert json.loads((run / "config.json").read_text())["epochs"] == 3
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["knn"]) for row in rows] == [False, True, True]
    assert all(float(row["loss"]) > 0 and float(row["images_per_s"]) > 0 for row in rows)
    assert {float(row["chance"]) for row in rows} == {math.log(63)}
    saved = checkpoint.load(checkpoint.find(run))
    assert saved["facts"]["images"] == 64
    assert saved["facts"]["after"]["knn"] == float(rows[-1]["knn"])
    assert saved["facts"]["before"]["bank"] == saved["facts"]["after"]["bank"] == 64
    with Image.open(run / "report.png") as report:
        assert report.width > 800
    assert list(run.glob("events.out.tfevents.*"))
    assert "kNN accuracy" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)  # two processes one after the other, each of which loads PyTorch
def test_a_run_killed_at_any_moment_and_resumed_ends_as_if_it_had_never_stopped(small_settings, tmp_path, monkeypatch):
    settings = small_settings(epochs=6, resume=True)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    pretrain(settings)
    broken = tmp_path / "broken"
    last = broken / "runs" / "small" / "checkpoints" / "last.ckpt"
    for epoch, *killed_after in (
        (1, "EveryEpoch", "on_train_epoch_end", "2"),  # at once after its second checkpoint
        (2, "SimCLR", "loss", "3"),  # within the first step of its second epoch
    ):
        assert run_in_process(settings, broken, *killed_after) == -signal.SIGKILL
        assert checkpoint.load(last)["epoch"] == epoch
    monkeypatch.chdir(broken)
    pretrain(settings)

    whole, pieces = (
        checkpoint.load(tmp_path / name / "runs" / "small" / "checkpoints" / "last.ckpt")
        for name in ("whole", "broken")
    )
    assert whole["global_step"] == pieces["global_step"] == 12
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, pieces["state_dict"][name]), name
    momenta = [saved["optimizer_states"][0]["state"] for saved in (whole, pieces)]
    assert momenta[0].keys() == momenta[1].keys()
    for key in momenta[0]:
        assert torch.equal(momenta[0][key]["momentum"], momenta[1][key]["momentum"])
    assert [row["loss"] for row in whole["history"]] == [row["loss"] for row in pieces["history"]]


@pytest.mark.slow
def test_ctrl_c_ends_the_run_after_the_epoch_with_a_checkpoint(small_shapes, tmp_path):
    command = [sys.executable, ROOT / "training" / "pretrain.py", "--data", small_shapes, "--name", "small"]
    command += ["--size-px", "16", "--batch-size", "32", "--epochs", "2000", "--knn-epochs", "5000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "small" / "metrics.csv"
    while not metrics.exists():
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate()
    assert process.returncode == 130
    assert "Stopping at the end of this epoch" in said
    assert "Traceback" not in said
    epochs = len(metrics.read_text().splitlines()) - 1
    assert f"Stopped after {epochs} of 2000 epochs. Run the same command with --resume to continue." in printed
    saved = checkpoint.load(tmp_path / "runs" / "small" / "checkpoints" / "last.ckpt")
    assert (saved["epoch"], saved["global_step"]) == (epochs - 1, 2 * epochs)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(small_settings, capsys):
    run = pretrain(small_settings(epochs=1))
    written = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    pretrain(small_settings(epochs=1, resume=True))
    assert "is finished: kNN accuracy" in capsys.readouterr().out
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match=r"runs/small already contains a run: continue it with --resume"):
        pretrain(small_settings(epochs=1))
    with pytest.raises(CheckpointError, match=r"was started with --epochs 1, not 2"):
        pretrain(small_settings(epochs=2, resume=True))


@pytest.mark.slow
def test_a_run_is_not_continued_on_other_pictures(small_settings, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (i * 40, 0, 0)).save(pictures / f"{i}.png")
    pretrain(small_settings(data=str(pictures), batch_size=4, epochs=2, max_steps=1))
    Image.new("RGB", (16, 16)).save(pictures / "more.png")
    with pytest.raises(CheckpointError, match=r"trained on 5 images and .* now has 6"):
        pretrain(small_settings(data=str(pictures), batch_size=4, epochs=2, resume=True))


@pytest.mark.slow
def test_two_pictures_and_a_batch_of_512_are_trained_as_a_batch_of_two(small_settings, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        Image.new("RGB", (30, 20), (255 * i, 0, 0)).save(pictures / f"{i}.png")
    run = pretrain(small_settings(data=str(pictures), batch_size=512, epochs=2))
    printed = capsys.readouterr().out
    assert "batch size 512 -> 2" in printed
    assert "two views of a picture find each other among 2 pictures" in printed
    assert (run / "report.png").exists()


@pytest.mark.parametrize(
    ("preset", "given", "images", "world", "expected"),
    [
        ("photos", 512, 1000, 1, 100),  # ten steps an epoch
        ("photos", 512, 1000, 3, 99),
        ("photos", 512, 5120, 1, 512),
        ("photos", 512, 200, 1, 32),  # not below 32
        ("photos", 512, 20, 1, 20),
        ("photos", 500, 1000, 1, 500),  # given by the user
        ("photos", 500, 400, 1, 400),
        ("tiny", 128, 1000, 1, 100),
    ],
)
def test_the_batch_of_a_preset_shrinks_to_ten_steps_an_epoch(capsys, preset, given, images, world, expected):
    settings = dataclasses.replace(PRESETS[preset][1], batch_size=given, data="pictures")
    assert check_batch(settings, images, world).batch_size == expected
    printed = capsys.readouterr().out
    assert (f"batch size {given} -> {expected}: pictures has only {images:,} pictures" in printed) == (
        given != expected
    )
    assert ("at least 10 steps" in printed) == (given <= images and given != expected)


@pytest.mark.parametrize(
    ("changes", "images", "epochs"),
    [
        ({"batch_size": 128}, 3409, 2),
        ({"batch_size": 32}, 300, 6),  # 54 steps
        ({"batch_size": 32}, 32, 52),
        ({"batch_size": 128}, 10**6, 2),
        ({"batch_size": 32, "head_first": 1}, 300, 4),
        ({"batch_size": 32, "epochs": 1}, 300, 1),
        ({"batch_size": 32, "preset": "tiny"}, 300, 2),
        ({"batch_size": 32, "minutes": 1.0}, 300, 2),
    ],
)
def test_few_pictures_are_adapted_to_in_more_epochs(changes, images, epochs):
    assert enough_epochs(dataclasses.replace(PRESETS["adapt"][1], **changes), images).epochs == epochs


def test_crops_follow_the_spread_of_pictures_that_are_squeezed_to_a_square(tmp_path, small_settings, capsys):
    for i in range(10):
        Image.new("RGB", (30, 30) if i % 2 else (90, 40)).save(tmp_path / f"{i}.png")
    source, squeezed = open_source(str(tmp_path)), small_settings(crop=None)
    assert widen_crops(small_settings(), source).augment.crop_aspect == 4 / 3
    assert widen_crops(squeezed, source).augment.crop_aspect == 2.0  # 4 / 3 times the root of 2.25
    assert "crops have sides of up to 2.0 to 1" in capsys.readouterr().out
    chosen = dataclasses.replace(squeezed, augment=AugmentSettings(crop_aspect=1.1))
    assert widen_crops(chosen, source).augment.crop_aspect == 1.1
    for i in range(0, 10, 2):
        (tmp_path / f"{i}.png").unlink()
    assert widen_crops(squeezed, open_source(str(tmp_path))).augment.crop_aspect == 4 / 3


@pytest.mark.slow
def test_a_run_with_squeezed_pictures_records_its_crops(tmp_path, small_settings):
    (tmp_path / "some").mkdir()
    for i in range(8):
        Image.new("RGB", (30, 30) if i % 2 else (90, 40), (30 * i, 0, 0)).save(tmp_path / "some" / f"{i}.png")
    run = pretrain(small_settings(data=str(tmp_path / "some"), crop=None, batch_size=4, epochs=1))
    assert json.loads((run / "config.json").read_text())["augment"]["crop_aspect"] == 2.0


@pytest.mark.slow
def test_a_run_says_which_folders_are_splits(small_settings, tmp_path, capsys):
    for name in ("train2017/1.png", "train2017/2.png", "val2017/3.png", "val2017/4.png"):
        (tmp_path / "some" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "some" / name)
    pretrain(small_settings(data=str(tmp_path / "some"), batch_size=2, epochs=1))
    assert "/some: for training: train2017; for testing: val2017\n" in capsys.readouterr().out


def test_one_picture_is_refused(small_settings, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "pictures" / "only.png")
    with pytest.raises(DataError, match="pictures has 1 picture that can be read; SimCLR compares pictures"):
        pretrain(small_settings(data=str(tmp_path / "pictures")))


@pytest.mark.slow
def test_broken_files_are_listed_in_the_run_and_the_rest_is_trained_on(small_settings, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(10):
        Image.new("RGB", (16, 16), (i * 20, 0, 0)).save(pictures / f"{i}.png")
    for i in (2, 5, 7):
        (pictures / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes()[:40])
    run = pretrain(small_settings(data=str(pictures), batch_size=4, epochs=1))
    rows = list(csv.reader((run / "skipped.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["name", "2.png", "5.png", "7.png"]
    assert checkpoint.load(checkpoint.find(run))["facts"]["images"] == 7


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(small_settings, monkeypatch):
    """os.fsync represents every call that can fail on a full disk."""
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    calls = []
    fsync = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    pretrain(small_settings(name="decodes-the-pictures", epochs=1, max_steps=1))
    calls.clear()
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    words = r"runs/small/checkpoints/last.ckpt could not be written: No space left on device; the previous one is kept"
    with pytest.raises(CheckpointError, match=words):
        pretrain(small_settings())
    folder = Path("runs/small/checkpoints")
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert checkpoint.load(folder / "last.ckpt")["epoch"] == 1


def test_a_file_that_is_not_a_checkpoint_is_named(small_settings, tmp_path):
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 half a zip"):
        path = tmp_path / "last.ckpt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"last\.ckpt is not a checkpoint"):
            checkpoint.load(path)
    torch.save({"model": torch.zeros(1)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of training/pretrain\.py"):
        checkpoint.load(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="nowhere contains no checkpoint"):
        checkpoint.find(Path("nowhere"))


@pytest.mark.slow
def test_a_run_starts_from_an_earlier_ones_encoder_and_head_and_resumes_without_it(small_settings, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    earlier = pretrain(small_settings(name="earlier", epochs=1))
    before, begun, begins = checkpoint.load(checkpoint.find(earlier)), [], SimCLR.on_train_start

    def on_train_start(self):
        begun.append({name: value.clone() for name, value in self.state_dict().items()})
        begins(self)

    monkeypatch.setattr(SimCLR, "on_train_start", on_train_start)
    run = pretrain(small_settings(init=str(earlier), epochs=3, max_steps=2))
    assert all(torch.equal(w, begun[0][name]) for name, w in before["state_dict"].items())
    saved = checkpoint.load(checkpoint.find(run))
    assert saved["facts"]["origin"] == "earlier"
    assert saved["facts"]["before"].items() >= before["facts"]["after"].items()
    shutil.rmtree(earlier)  # a run that has started does not need it any more
    pretrain(small_settings(init=str(earlier), epochs=3, resume=True))
    assert checkpoint.load(checkpoint.find(run))["global_step"] == 6


@pytest.mark.slow
def test_a_note_says_that_pictures_are_much_smaller_than_those_of_the_weights(small_settings, capsys):
    pretrain(small_settings(name="earlier", size_px=64, epochs=1))
    pretrain(small_settings(init="runs/earlier", size_px=64, epochs=1))
    assert "note: runs/earlier takes 64 px and these pictures have 24: enlarged" in capsys.readouterr().out


@pytest.mark.slow
def test_a_head_of_other_layers_starts_at_random_and_the_encoder_does_not(small_settings, capsys):
    earlier = pretrain(small_settings(name="earlier", epochs=1, head_layers=2))
    start = load_initial(str(earlier), None, None, None, 0)
    module = SimCLR(small_settings(), RandomPictures(8), None, start)
    fresh = SimCLR(small_settings(), RandomPictures(8), None)
    assert torch.equal(module.encoder.conv1.weight, start.encoder.conv1.weight)
    assert torch.equal(module.projector[0].weight, fresh.projector[0].weight)
    assert "note: the projection head of earlier does not match --head-layers" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_from_torchvisions_weights_has_their_architecture_and_size(tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.pth")
    init = f"resnet18:{tmp_path / 'theirs.pth'}"
    settings, start = starting_point(PretrainSettings(init=init))
    assert (settings.encoder, settings.width, settings.size_px) == ("torchvision:resnet18", 1, 224)
    assert f"this run is torchvision:resnet18 at 224 px, like {init}" in capsys.readouterr().out
    assert starting_point(PretrainSettings(init=init, size_px=128))[0].size_px == 128
    module = SimCLR(settings, RandomPictures(8), None, start)
    ours, theirs = (f.network.layer4[1].conv2.weight for f in (module.encoder, start.encoder))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": "nowhere"}, "--init nowhere: no run, checkpoint or exported encoder has this name"),
        ({"init": "earlier.ckpt", "encoder": "resnet18"}, "has --encoder tiny, not resnet18"),
        (
            {"init": "earlier.ckpt", "size_px": 64},
            "earlier.ckpt takes 16 px, and an encoder for",
        ),
        ({"init": "resnet18:earlier.ckpt"}, "resnet18:earlier.ckpt: these weights are of another architecture"),
        ({"init": "resnet18:RANDOM_V1"}, "RANDOM_V1 is neither a file nor weights of resnet18"),
        ({"encoder": "resnet19"}, "resnet19 is not an architecture: did you mean resnet18"),
        ({"encoder": "timm:vit_tiny_patch16_224", "width": 2}, "--width 2 is only for tiny"),
        ({"init": "notes.txt"}, "notes.txt is not a checkpoint"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_anything_is_decoded(small_settings, tmp_path, changes, words):
    weights = {f"encoder.{name}": value for name, value in ResNetEncoder("tiny", 1, 16).state_dict().items()}
    content = {"settings": small_settings().to_dict(), "state_dict": weights, "facts": {}, "history": []}
    torch.save(content, tmp_path / "earlier.ckpt")
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=words):
        pretrain(small_settings(**changes))
    assert not Path("data").exists() and not Path("runs").exists()


@pytest.mark.slow
def test_weights_of_another_normalisation_are_recognised_by_their_first_batch_norm(capsys):
    pixels, (encoder, own) = RandomPictures(64).pixels, (ResNetEncoder("tiny", 1, 16) for _ in range(2))
    encoder.train()
    for _ in range(40):
        encoder(to_input(torch.from_numpy(pixels)))
    assert statistics_mismatch(encoder, pixels) < 0.3
    apply_initial(InitialWeights(encoder, None, PretrainSettings(), "theirs"), own, torch.nn.Identity(), pixels)
    assert capsys.readouterr().out == ""
    encoder.bn1.running_mean -= 5 * encoder.bn1.running_var.sqrt()
    apply_initial(InitialWeights(encoder, None, PretrainSettings(), "theirs"), own, torch.nn.Identity(), pixels)
    assert "note: theirs was trained on different pictures or with another normalisation" in capsys.readouterr().out


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_step_is_that_of_the_setting(small_settings, name):
    module = SimCLR(small_settings(loss=name), RandomPictures(8), None)
    images = torch.from_numpy(module.train_store.pixels)
    z_a, z_b = module.project_views(images, module.draws(images, 3))
    losses = {other: row.function(z_a, z_b, 0.2).item() for other, row in LOSSES.items()}
    assert len(set(losses.values())) == len(LOSSES)
    assert module.loss(images, 3).item() == losses[name]


@pytest.mark.parametrize("chunk_size", [0, 8])
def test_with_three_views_the_loss_is_the_mean_over_the_pairs_of_views(small_settings, chunk_size):
    module = SimCLR(small_settings(views=3, chunk_size=chunk_size), RandomPictures(8), None)
    images = torch.from_numpy(module.train_store.pixels)
    z = module.project_views(images, module.draws(images, 3))
    assert [len(view) for view in z] == [8, 8, 8]
    losses = [LOSSES["nt_xent"].function(a, b, 0.2).item() for a, b in ((z[0], z[1]), (z[0], z[2]), (z[1], z[2]))]
    assert len(set(losses)) == 3
    assert module.loss(images, 3).item() == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_chunks_of_a_batch_with_three_views_get_their_own_draws(small_settings, monkeypatch):
    module = SimCLR(small_settings(views=3, chunk_size=3), RandomPictures(8), None)
    images, parts = torch.from_numpy(module.train_store.pixels), []
    views = module.draws(images, 3).top.view(3, 8)
    project = module.project_views
    module.project_views = lambda images, draws: parts.append(draws.top) or project(images, draws)
    module.loss(images, 3)
    wanted = [views[:, start : start + 3].flatten() for start in (0, 3, 6)]
    assert all(torch.equal(part, of_chunk) for part, of_chunk in zip(parts, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("is_better", [True, False])
def test_the_average_of_the_weights_is_kept_if_it_measures_better(small_settings, monkeypatch, capsys, is_better):
    """An average over few steps of a large learning rate is far from the last weights."""
    measured = []

    def metrics(encoder, *arguments):
        measured.append({name: value.clone() for name, value in encoder.state_dict().items()})
        return {"knn": 0.4 + 0.1 * (len(measured) == (3 if is_better else 2)), "k": 1, "queries": 1, "bank": 1}

    monkeypatch.setattr("training.simclr.knn.metrics", metrics)
    trial = pretrain(small_settings(name="trial", ema=0.5, epochs=9, max_steps=2))  # keeps the weights to continue with
    assert torch.equal(
        checkpoint.load(checkpoint.find(trial))["state_dict"]["encoder.conv1.weight"], measured[1]["conv1.weight"]
    )
    assert "kept the average" not in capsys.readouterr().out
    measured.clear()
    run = pretrain(small_settings(ema=0.5, epochs=2))
    saved = checkpoint.load(checkpoint.find(run))
    kept, other = (measured[2], measured[1]) if is_better else (measured[1], measured[2])
    assert torch.equal(saved["state_dict"]["encoder.conv1.weight"], kept["conv1.weight"])
    assert not torch.equal(kept["conv1.weight"], other["conv1.weight"])
    assert saved["facts"]["after"]["knn"] == 0.5
    words = "kept the average of the weights: the average measured 50.0%, the last step 40.0%"
    assert (words in capsys.readouterr().out) == is_better


@pytest.mark.slow
def test_a_resumed_run_continues_its_average(small_settings):
    whole = pretrain(small_settings(name="whole", ema=0.9, epochs=3))
    pretrain(small_settings(name="pieces", ema=0.9, epochs=3, max_steps=4))
    pieces = pretrain(small_settings(name="pieces", ema=0.9, epochs=3, resume=True))
    averages = [checkpoint.load(checkpoint.find(run))["average"] for run in (whole, pieces)]
    assert averages[0]["n_averaged"] == averages[1]["n_averaged"] == 6
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


def test_the_average_follows_the_weights_and_the_statistics_of_batch_norm():
    encoder, average = ResNetEncoder("tiny", 1, 16), None
    for value in (1.0, 2.0):
        average = average or Average(encoder, 0.75)
        with torch.no_grad():
            encoder.conv1.weight.fill_(value)
            encoder.bn1.running_mean.fill_(10 * value)
        average.update(encoder)
    assert average.weights["conv1.weight"].flatten()[0] == pytest.approx(0.75 * 1 + 0.25 * 2)
    assert average.weights["bn1.running_mean"][0] == pytest.approx(12.5)


@pytest.mark.slow
def test_a_run_without_progress_stops_early_with_its_best_weights_and_keeps_checkpoints(
    small_settings, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    figures, measured = iter([0.1, 0.2, 0.5, 0.4, 0.4, 0.5]), []  # before, four epochs, at the end

    def metrics(encoder, *arguments):
        measured.append(encoder.conv1.weight.clone())
        return {"knn": next(figures), "k": 1, "queries": 1, "bank": 1}

    monkeypatch.setattr("training.simclr.knn.metrics", metrics)
    run = pretrain(small_settings(epochs=9, knn_epochs=1, patience=2, keep_every=3))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["best.ckpt", "epoch-0003.ckpt", "last.ckpt"]
    saved, best = checkpoint.load(checkpoint.find(run)), checkpoint.load(run / "checkpoints" / "best.ckpt")
    assert torch.equal(saved["state_dict"]["encoder.conv1.weight"], measured[2])
    assert torch.equal(best["state_dict"]["encoder.conv1.weight"], measured[2])
    assert not torch.equal(measured[2], measured[4])
    printed = capsys.readouterr().out
    assert "stopped early after epoch 4; the weights are those of 2" in printed
    pretrain(small_settings(epochs=9, knn_epochs=1, patience=2, keep_every=3, resume=True))
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "title", "chance"), [("nt_xent", "NT-Xent", 63), ("dcl", "DCL", 62)])
def test_the_report_names_the_loss_and_draws_its_chance_level(small_settings, name, title, chance):
    row = {"epoch": 1, "loss": 3.0, "lr": 0.1, "knn": 0.2}
    module = SimpleNamespace(settings=small_settings(loss=name), history=[row], facts={"before": {"knn": 0.1}})
    figure = Figure()
    report._curves(figure, module)
    losses, level = figure.axes[0].lines
    assert figure.axes[0].get_title() == f"{title}, nats"
    assert list(losses.get_ydata()) == [3.0]
    assert list(level.get_ydata()) == [math.log(chance)] * 2


@pytest.mark.slow
def test_a_run_with_dcl_records_its_chance_level(small_settings):
    run = pretrain(small_settings(loss="dcl", epochs=1))
    (row,) = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    assert float(row["chance"]) == math.log(62)
    assert checkpoint.settings_of(checkpoint.load(checkpoint.find(run))).loss == "dcl"


def test_every_step_has_views_of_its_own_and_the_same_ones_every_time(small_settings):
    module = SimCLR(small_settings(), RandomPictures(8), None)
    images = torch.from_numpy(module.train_store.pixels)
    first, again, next_step = (render(images.repeat(2, 1, 1, 1), module.draws(images, step), 16) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)
    view_a, view_b = first.chunk(2)
    assert not torch.equal(view_a, view_b)


def test_the_seed_and_the_process_reach_the_views(small_settings, monkeypatch):
    images = torch.from_numpy(RandomPictures(8).pixels)
    draws = [SimCLR(small_settings(seed=seed), RandomPictures(8), None).draws(images, 0).top for seed in (0, 1)]
    monkeypatch.setattr(SimCLR, "global_rank", 1)
    draws.append(SimCLR(small_settings(), RandomPictures(8), None).draws(images, 0).top)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


@pytest.mark.slow
def test_a_batch_in_chunks_of_its_own_size_has_the_loss_of_the_whole(small_settings):
    """And smaller chunks, whose batch norms see less, have the loss of another draw of the same kind."""
    images = torch.from_numpy(RandomPictures(8).pixels)
    whole, one, two = (
        SimCLR(small_settings(chunk_size=size), RandomPictures(8), None).loss(images, 3).item() for size in (0, 8, 4)
    )
    assert whole == one != two
    assert abs(whole - two) < 0.5


@pytest.mark.slow
def test_the_augmentation_compiles_whole_and_gives_the_same_views(small_settings):
    module = SimCLR(small_settings(), RandomPictures(8), None)
    images = torch.from_numpy(module.train_store.pixels)
    module.compile_parts(images)
    assert module.render is not render, "torch.compile failed"
    arguments = images.repeat(2, 1, 1, 1), module.draws(images, 5), 16
    torch.testing.assert_close(module.render(*arguments), render(*arguments), rtol=0, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_a_compiled_network_that_fails_is_trained_uncompiled_and_unchanged(small_settings, monkeypatch, capsys, world):
    """torch.compile compiles, and fails, in the first step; with two processes f and g are not compiled."""

    def fails(*arguments):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr("training.simclr.compiles_networks", lambda device, world: world == 1)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function if function is render else fails)
    module = SimCLR(small_settings(), RandomPictures(8), None)
    project, before = module.project, {name: value.clone() for name, value in module.state_dict().items()}
    module.compile_parts(torch.from_numpy(module.train_store.pixels), world)
    assert ("training without torch.compile, which would be faster: no compiler" in capsys.readouterr().out) == (
        world == 1
    )
    assert module.project is project
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(p.grad is not None and p.grad.any() for p in module.parameters())


def test_projections_are_gathered_in_float32_in_mixed_precision_too(small_settings, monkeypatch):
    gathered = []
    monkeypatch.setattr("training.simclr.gather", lambda z: gathered.append(z.dtype) or z)
    module = SimCLR(small_settings(), RandomPictures(8), None)
    with torch.autocast("cpu", torch.bfloat16):
        module.loss(torch.from_numpy(module.train_store.pixels), 0)
    assert gathered == [torch.float32] * 2


def test_networks_are_compiled_on_one_gpu_only():
    kinds = [("cuda", 1), ("cuda", 2), ("cpu", 1)]
    assert [compiles_networks(torch.device(kind), world) for kind, world in kinds] == [True, False, False]


def test_loss_scale_multiplies_the_gradient_and_not_the_logged_loss(small_settings):
    losses, logged = [], []
    for scale in (1.0, 2.0):
        module = SimCLR(small_settings(loss_scale=scale), RandomPictures(8), None)
        module._trainer, module.loss_sum = SimpleNamespace(global_step=0, global_rank=0), 0.0
        module.log = lambda name, value: logged.append(value.item())
        losses.append(module.training_step(torch.from_numpy(module.train_store.pixels), 0).item())
    assert losses[1] == pytest.approx(2 * losses[0]) and logged[0] == pytest.approx(logged[1])


@pytest.mark.slow
def test_what_was_compiled_before_the_first_step_is_what_mixed_precision_runs(small_settings, monkeypatch):
    """bfloat16 on the CPU represents a GPU's."""
    trainers = MixedPrecision("bf16-mixed", "cpu")
    monkeypatch.setattr("training.simclr.mixed_precision", lambda on, network: trainers.autocast_context_manager())
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    module = SimCLR(small_settings(), RandomPictures(8), None)
    images = torch.from_numpy(module.train_store.pixels)
    module.compile_parts(images)
    with trainers.forward_context():
        assert module.loss(images, 0).isfinite()


@pytest.mark.parametrize(
    ("chunk_size", "dense_rows"),
    [(0, 0), pytest.param(0, 8192, marks=pytest.mark.slow), pytest.param(8, 8192, marks=pytest.mark.slow)],
)
def test_a_step_reads_no_value_so_that_on_a_gpu_nothing_waits(chunk_size, dense_rows, small_settings, monkeypatch):
    """Fake tensors, which have a shape and a type only, replace a device's: reading a value raises."""
    monkeypatch.setattr("training.loss.DENSE_ROWS", dense_rows)
    settings = small_settings(batch_size=16, chunk_size=chunk_size)
    module = SimCLR(settings, RandomPictures(16), None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
        optimizer = module.configure_optimizers()["optimizer"]
        for step in range(2):  # the first one makes the momentum
            loss = module.loss(torch.empty(16, 16, 16, 3, dtype=torch.uint8), step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.slow
def test_a_run_trains_uncompiled_where_nothing_compiles_and_says_so(small_settings, monkeypatch, capsys):
    def fails(*arguments, **options):
        def call(*arguments):
            raise RuntimeError("no C++ compiler\nand more")

        return call

    monkeypatch.setattr("training.simclr.torch.compile", fails)
    pretrain(small_settings(epochs=1, compile=True))
    assert "training without torch.compile, which would be faster: no C++ compiler\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_table_can_be_given_trains_and_has_sensible_learning_rates(small_settings, name):
    assert parse(["--optimizer", name]).optimizer == name
    low, high = OPTIMIZERS[name].sensible_lr
    assert 0 < low < high
    module = SimCLR(small_settings(optimizer=name, lr=low, lr_scaling="none", momentum=0.5), RandomPictures(64), None)
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is type(OPTIMIZERS[name].build(lars_groups(module, 0.0), low, 0.5))
    for group in optimizer.param_groups:
        assert group["lr"] == 0.0
        assert group["initial_lr"] == low
        assert group.get("momentum", 0.5) == 0.5
        group["lr"] = low
    before = module.encoder.conv1.weight.clone()
    module.loss(torch.from_numpy(module.train_store.pixels), 0).backward()
    optimizer.step()
    assert module.encoder.conv1.weight.isfinite().all() and not torch.equal(module.encoder.conv1.weight, before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_learning_rate_starts_at_0_and_batch_norm_never_decays(small_settings, optimizer):
    module = SimCLR(small_settings(optimizer=optimizer, warmup=0.5), RandomPictures(64), None)
    chosen = module.configure_optimizers()
    matrices, vectors = chosen["optimizer"].param_groups
    assert matrices["lr"] == 0.0
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (1e-4, 0.0)
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim <= 1 for p in vectors["params"])
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for group in (matrices, vectors) for p in group["params"])


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    for arguments, words in (
        (["--data", "no/such/folder"], "error: there is no folder or file no/such/folder"),
        (["--data", str(tmp_path)], "holds no files"),
    ):
        result = subprocess.run(
            [sys.executable, ROOT / "training" / "pretrain.py", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert result.returncode == 1
        assert words in result.stderr
        assert "Traceback" not in result.stderr
