"""Small fine-tunings: what is trained and what is frozen, which epoch is kept, and the content of the checkpoint."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.artifact import Preprocessing
from export.spreadsheet import read_rows, write_rows
from export.to_onnx import ExportSettings, export
from training import checkpoint, classifier, initial, recipes
from training.augment import augment
from training.checkpoint import CheckpointError
from training.classifier import Classifier
from training.data import store
from training.data.labelled import hold_out
from training.data.sources import DataError, open_source
from training.data.store import PixelStore
from training.encoders import ResNetEncoder, embed
from training.evaluate import EvaluateSettings, evaluate
from training.evaluation.features import open_encoder
from training.evaluation.knn import knn_predict
from training.finetune import (
    TaskData,
    balanced_accuracy,
    evaluate_classifier,
    finetune,
    optimizers,
    order,
    right_before,
    train_classifier,
)
from training.pretrain import pretrain
from training.recipes import FinetuneSettings
from training.resumable import ResumableRun, TrainingProgress


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pretrained_once(small_settings, tmp_path_factory) -> Path:
    with contextlib.chdir(tmp_path_factory.mktemp("pretrained")):
        return pretrain(small_settings(epochs=1)).resolve()


@pytest.fixture
def pretrained(pretrained_once) -> Path:
    """A run of one epoch, as a copy that a test may change."""
    return Path(shutil.copytree(pretrained_once, Path("runs") / pretrained_once.name))


@pytest.fixture
def settings(small_shapes):
    def make(**changes) -> FinetuneSettings:
        return FinetuneSettings(
            **{"data": str(small_shapes), "name": "adapted", "epochs": 2, "batch_size": 16, "held_out": 0.1} | changes
        )

    return make


def brightness(n: dict[int, int], tmp_path) -> PixelStore:
    """Class 1 is bright, class 0 dark."""
    labels = np.repeat(list(n), list(n.values()))
    level = np.where(labels == 1, 200, 20)[:, None, None, None]
    pixels = (level + np.random.default_rng(0).integers(0, 40, (len(labels), 16, 16, 3))).astype(np.uint8)
    return PixelStore("some", pixels, labels, ["dark", "bright"], [], [], tmp_path)


def small(classes=2, seed=0):
    torch.manual_seed(seed)
    return Classifier(ResNetEncoder("tiny", 1, 16), None, classes)


@pytest.mark.slow
def test_the_saved_classifier_has_the_reported_accuracy(pretrained, settings, capsys):
    run = finetune(settings(init=str(pretrained)))
    network, saved = classifier.load(run / "checkpoints" / "last.ckpt")
    assert (
        saved["classifier"]["classes"] == sorted(saved["classifier"]["classes"]) and not saved["classifier"]["hidden"]
    )
    facts = json.loads((run / "result.json").read_text())
    assert facts == saved["facts"]
    test = store.load(open_source(settings().data), Preprocessing(16), "test")
    right = (embed(network, np.array(test.pixels)).argmax(dim=1).numpy() == test.labels).mean()
    assert facts["after"]["test"]["accuracy"] == pytest.approx(right)
    printed, judged = capsys.readouterr().out, facts["after"]["test"]
    assert f"test accuracy {right:.1%} (" in printed and judged["verdict"] + "\n" in printed
    start = checkpoint.encoder_of(checkpoint.load(checkpoint.find(pretrained)))
    known = store.load(open_source(settings().data), Preprocessing(16), "train")
    held_out = hold_out(known.labels, 0.1, 0)[0]
    guess = knn_predict(
        embed(start, np.array(known.pixels)[held_out]),
        torch.from_numpy(known.labels[held_out]),
        embed(start, np.array(test.pixels)),
        1,
    )
    assert judged["before"] == pytest.approx((guess.numpy() == test.labels).mean())
    assert (run / "report.png").exists() and len((run / "metrics.csv").read_text().splitlines()) == 3
    with pytest.raises(CheckpointError, match="runs/adapted already contains a run"):
        finetune(settings(init=str(pretrained)))


@pytest.mark.slow
def test_a_classifiers_encoder_can_be_evaluated_exported_and_used_as_init(pretrained, settings):
    run = finetune(settings(init=str(pretrained), epochs=1))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    network, _ = classifier.load(run / "checkpoints" / "last.ckpt")
    expected = embed(network.encoder, pixels)
    torch.testing.assert_close(open_encoder(str(run))(pixels), expected)
    bundle, _ = export(ExportSettings(str(run)))
    torch.testing.assert_close(open_encoder(str(bundle.folder))(pixels), expected, rtol=1e-4, atol=1e-5)
    again = initial.load_initial(str(bundle.folder), None, None, None, 0)
    torch.testing.assert_close(embed(again.encoder, pixels), expected)
    assert again.projector is None
    assert evaluate(EvaluateSettings((str(run),), data=settings().data, linear="none"))["rows"][0]["dimension"] == 128


@pytest.mark.slow
def test_a_linear_probe_does_not_change_the_encoder(pretrained, settings):
    run = finetune(settings(init=str(pretrained), mode="linear"))
    before = checkpoint.load(checkpoint.find(pretrained))["state_dict"]
    after = checkpoint.load(run / "checkpoints" / "last.ckpt")["state_dict"]
    for name, value in after.items():
        if name.startswith("encoder."):
            assert torch.equal(value, before[name]), name  # running statistics too
    assert after["classifier.weight"].abs().sum() > 0


@pytest.mark.slow
def test_mode_head_starts_from_the_heads_first_layer_and_trains_it(pretrained, settings, monkeypatch):
    begun, layers = [], []

    def train(network, task, s, run):
        begun.append({name: value.clone() for name, value in network.state_dict().items()})
        layers.extend(type(layer).__name__ for layer in network.hidden)
        return train_classifier(network, task, s, run)

    monkeypatch.setattr("training.finetune.train_classifier", train)
    run = finetune(settings(init=str(pretrained), mode="head"))
    before = checkpoint.load(checkpoint.find(pretrained))["state_dict"]
    network, saved = classifier.load(run / "checkpoints" / "last.ckpt")
    assert saved["classifier"]["hidden"]
    assert torch.equal(begun[0]["hidden.0.weight"], before["projector.0.weight"])
    assert torch.equal(begun[0]["hidden.1.bias"], before["projector.1.bias"])
    assert not torch.equal(network.hidden[0].weight, before["projector.0.weight"])
    assert not torch.equal(network.encoder.conv1.weight, before["encoder.conv1.weight"])
    assert layers == [type(layer).__name__ for layer in network.hidden] == ["Linear", "BatchNorm1d", "ReLU"]


@pytest.mark.slow
def test_mode_head_refuses_a_head_without_a_hidden_layer(small_settings, settings):
    run = pretrain(small_settings(epochs=1, head_layers=1, name="one"))
    with pytest.raises(CheckpointError, match="this head has no hidden layer"):
        finetune(settings(init=str(run), mode="head"))
    with pytest.raises(CheckpointError, match="--mode head needs a pretrained run: give its folder as --init"):
        finetune(settings(mode="head"))


def test_lars_without_decay_adapts_all_matrices_except_the_classifier():
    network = small()
    settings = replace(recipes.PRESETS["v2"][1], mode="full")
    optimizer, _ = optimizers(network, settings, 16, 10)
    lr = optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(0.005 * 16**0.5)
    torch.nn.init.ones_(network.classifier.weight)  # a weight of zero would not be adapted anyway
    before = {name: w.detach().clone() for name, w in network.named_parameters()}
    for w in network.parameters():
        w.grad = torch.full_like(w, 0.5)
    optimizer.step()
    for name, w in network.named_parameters():
        moved = (before[name] - w.detach()).norm()
        adapted = name.startswith("encoder.") and w.ndim > 1
        expected = 1e-3 * before[name].norm() if adapted else 0.5 * w.numel() ** 0.5
        torch.testing.assert_close(moved, lr * torch.as_tensor(expected), rtol=0.02, atol=1e-7, msg=name)


@pytest.mark.slow
def test_dark_and_bright_are_learnt_and_equal_settings_give_equal_weights(tmp_path):
    settings = FinetuneSettings(epochs=8, batch_size=8, seed=1, held_out=0.1)
    task = TaskData(settings, brightness({0: 20, 1: 20}, tmp_path), None)
    ends = []
    for _ in range(2):
        network = small()
        history = train_classifier(network, task, settings)
        ends.append(network.state_dict())
    assert max(row["held_out"] for row in history) == 1.0
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
def test_the_seed_reaches_the_views(tmp_path, monkeypatch):
    seen = []

    def noted(pixels, how, generator, size_px):
        seen.append(generator.initial_seed() % 2**32)  # what a CPU's generator keeps
        return augment(pixels, how, generator, size_px)

    monkeypatch.setattr("training.finetune.augment", noted)
    for seed in (0, 1):
        settings = FinetuneSettings(epochs=1, batch_size=8, seed=seed)
        train_classifier(small(), TaskData(settings, brightness({0: 8, 1: 8}, tmp_path / str(seed)), None), settings)
    assert len(seen) == len(set(seen)) == 4


def test_training_stops_after_patience_epochs_without_improvement_and_keeps_the_best(tmp_path, monkeypatch):
    found = iter([0.5, 0.7, 0.6, 0.7, 0.7, 0.9])
    states = []

    def judge(network, task, settings):
        states.append({name: w.clone() for name, w in network.state_dict().items()})
        return {"held_out": next(found), "held_out_loss": 1.0}

    monkeypatch.setattr("training.finetune.evaluate_held_out", judge)
    settings = FinetuneSettings(epochs=50, batch_size=8, patience=3, held_out=0.1)
    network = small()
    history = train_classifier(network, TaskData(settings, brightness({0: 9, 1: 9}, tmp_path), None), settings)
    assert [row["held_out"] for row in history] == [0.5, 0.7, 0.6, 0.7, 0.7]
    assert all(torch.equal(network.state_dict()[name], w) for name, w in states[1].items())


@pytest.mark.slow
def test_a_note_is_printed_for_pictures_much_smaller_than_the_encoders_input(small_settings, settings, capsys):
    pretrain(small_settings(epochs=1, size_px=64))
    finetune(settings(init="runs/small", epochs=1))
    assert "note: runs/small takes 64 px and these pictures have 24: enlarged" in capsys.readouterr().out


@pytest.mark.slow
def test_of_epochs_with_equal_accuracy_the_one_with_less_loss_is_kept(pretrained, settings, monkeypatch):
    losses = iter([3.0, 2.0, 1.0, 4.0])
    monkeypatch.setattr(
        "training.finetune.evaluate_held_out", lambda *_: {"held_out": 0.5, "held_out_loss": next(losses)}
    )
    run = finetune(settings(init=str(pretrained), epochs=4))
    assert json.loads((run / "result.json").read_text())["epochs"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("place", ["order", "classifier.save"])  # in its third epoch; after the last, at the very end
def test_a_resumed_run_ends_like_an_uninterrupted_one(pretrained, settings, monkeypatch, place):
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    judged = {"held_out": 0.5, "held_out_loss": 1.0}  # no epoch is better than the first: patience ends it
    monkeypatch.setattr("training.finetune.evaluate_held_out", lambda network, task, s: dict(judged))
    how = {"init": str(pretrained), "epochs": 9, "patience": 3}
    whole = finetune(settings(name="whole", **how))

    def stops(*arguments):
        if place == "classifier.save" or arguments[2] == 3:
            raise KeyboardInterrupt
        return order(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"training.finetune.{place}", stops)
        finetune(settings(**how))
    assert [path.name for path in Path("runs/adapted/checkpoints").iterdir()] == ["halfway.ckpt"]
    with pytest.raises(CheckpointError, match="runs/adapted has an unfinished run: give --resume"):
        finetune(settings(**how))
    run = finetune(settings(resume=True, **how))
    ends = [checkpoint.load(folder / "checkpoints" / "last.ckpt") for folder in (whole, run)]
    assert ends[0]["history"] == ends[1]["history"] and len(ends[0]["history"]) == 4
    assert all(torch.equal(w, ends[1]["state_dict"][name]) for name, w in ends[0]["state_dict"].items())
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_optimizer_and_schedule_are_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    settings = FinetuneSettings(epochs=4, batch_size=8, optimizer="lars", lr=2.0, warmup=0.3)
    task = TaskData(settings, brightness({0: 20, 1: 20}, tmp_path), None)
    whole, pieces = small(), small()
    history = train_classifier(whole, task, settings)
    stopping = ResumableRun(tmp_path, settings, 40)
    stopping.save = lambda *state: (ResumableRun.save(stopping, *state), 1 / (len(state[-1].history) - 2))
    with pytest.raises(ZeroDivisionError):
        train_classifier(pieces, task, settings, stopping)
    pieces = small(seed=5)
    assert (
        train_classifier(pieces, task, settings, ResumableRun(tmp_path, replace(settings, resume=True), 40)) == history
    )
    assert all(torch.equal(w, pieces.state_dict()[name]) for name, w in whole.state_dict().items())


@pytest.mark.slow
def test_a_run_is_resumed_only_with_its_own_settings_and_pictures(settings, tmp_path, capsys):
    run = finetune(settings())
    finetune(settings(resume=True))
    assert "runs/adapted is finished" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"runs/adapted was started with --epochs 2, not 7: give that"):
        finetune(settings(resume=True, epochs=7))
    (run / "checkpoints" / "last.ckpt").unlink()
    network = small()
    optimizer, scheduler = optimizers(network, settings(), 16, 10)
    ResumableRun(run, settings(), 30).save(network, optimizer, scheduler, TrainingProgress([]))
    with pytest.raises(CheckpointError, match=r"was started on 30 pictures and .*some shapes now has 5\d"):
        finetune(settings(resume=True))


@pytest.mark.slow
def test_a_pretraining_run_is_not_resumed_as_a_fine_tuning(pretrained, settings):
    with pytest.raises(CheckpointError, match="runs/small is not a fine-tuning: give another --name"):
        finetune(settings(name="small", resume=True))


def test_sampling_draws_each_class_equally_often_and_the_loss_weighs_it(tmp_path):
    settings = FinetuneSettings(held_out=0.0, balance="sampling")
    task = TaskData(settings, brightness({0: 900, 1: 100}, tmp_path), None)
    drawn = np.concatenate([task.labels[order(task, settings, epoch, 10)] for epoch in range(5)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    plain = order(task, replace(settings, balance="none"), 0, 10)
    assert sorted(plain) == list(range(1000))

    weighed = FinetuneSettings(held_out=0.0, balance="loss", epochs=1, batch_size=4, lr=1e-9)
    task = TaskData(weighed, brightness({0: 3, 1: 1}, tmp_path), None)
    network = small()
    with torch.no_grad():
        network.classifier.bias.copy_(torch.tensor([0.0, 2.0]))  # h has no say yet: the weights are zero
    loss = train_classifier(network, task, weighed)[0]["loss"]
    expected = torch.nn.functional.softplus(torch.tensor([2.0, -2.0])).mean().item()  # each class half
    assert loss == pytest.approx(expected, abs=1e-4)


def test_balanced_accuracy_weights_small_and_large_classes_equally():
    right, labels = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1])
    assert balanced_accuracy(right, labels) == 0.5


def test_a_verdict_on_the_pictures_that_chose_the_epoch_says_that_it_is_optimistic(tmp_path):
    task = TaskData(FinetuneSettings(held_out=0.25), brightness({0: 8, 1: 8}, tmp_path / "pictures"), None)
    network = small()
    found = evaluate_classifier(network, task, tmp_path, right_before(network.encoder, task))["held-out"]
    assert found["verdict"].endswith("; the best epoch was chosen on these pictures, so this is optimistic")


def test_used_labels_are_a_share_of_every_class_and_held_out_ones_are_not_trained_on(tmp_path):
    pictures = brightness({0: 100, 1: 50}, tmp_path)
    task = TaskData(FinetuneSettings(label_share=0.2, held_out=0.25), pictures, None)
    assert task.class_sizes.tolist() == [15, 7]
    assert not set(task.train_rows) & set(task.held_out_rows) and len(task.held_out_rows) == 8
    task = TaskData(FinetuneSettings(labels_per_class=3, held_out=0.0), pictures, None)
    assert task.class_sizes.tolist() == [3, 3] and len(task.held_out_rows) == 0
    with pytest.raises(DataError, match="class dark has 1 labelled picture, so none can be held out"):
        TaskData(FinetuneSettings(labels_per_class=1, held_out=0.1), pictures, None)
    with pytest.raises(DataError, match=r"--label-share 0\.005 leaves no picture of class bright"):
        TaskData(FinetuneSettings(label_share=0.005), pictures, None)


def test_initial_weights_that_do_not_fit_are_refused(pretrained, small_settings, tmp_path, capsys):
    for changes, words in (
        ({"encoder": "resnet18"}, "has --encoder tiny, not resnet18"),
        ({"width": 2}, "--width 1, not 2"),
        ({"size_px": 48}, "takes 16 px, and an encoder for 48 px has a different first layer"),
    ):
        asked = {"encoder": None, "width": None, "size_px": None} | changes
        with pytest.raises(CheckpointError, match=words):
            initial.load_initial(str(pretrained), **asked, seed=0)
    assert initial.load_initial(str(pretrained), None, None, 6, 0).settings.size_px == 6
    assert "was trained at 16 px; at 6 px its batch norm statistics do not fit" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no run, checkpoint or exported encoder has this name"):
        initial.load_initial("nowhere", None, None, None, 0)
    with pytest.raises(CheckpointError, match=r"\(nearest: resnet18"):
        initial.load_initial("resnt18", None, None, None, 0)
    (tmp_path / "graph.onnx").touch()
    with pytest.raises(CheckpointError, match="training cannot continue from an ONNX graph; give the weights"):
        initial.load_initial(str(tmp_path / "graph.onnx"), None, None, None, 0)
    with pytest.raises(CheckpointError, match="contains no classifier"):
        classifier.load(checkpoint.find(pretrained))


@pytest.mark.slow
def test_nan_weights_and_weights_of_another_architecture_are_refused(pretrained, settings):
    path = checkpoint.find(pretrained)
    saved = checkpoint.load(path)
    saved["state_dict"]["encoder.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"last\.ckpt holds weights that are NaN or infinite"):
        finetune(settings(init=str(pretrained)))
    saved["state_dict"] = {f"encoder.{name}": w for name, w in ResNetEncoder("tiny", 2, 16).state_dict().items()}
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"weights of another architecture than its settings, tiny for 16 px"):
        finetune(settings(init=str(pretrained)))


def test_a_class_of_the_test_split_without_training_pictures_is_named(tmp_path):
    learnt, asked = brightness({0: 5, 1: 5}, tmp_path), brightness({0: 2, 2: 2}, tmp_path)
    classes = ["dark", "bright", "dazzling"]
    with pytest.raises(DataError, match="has pictures of dazzling in its split test and none of it in train"):
        TaskData(FinetuneSettings(), replace(learnt, classes=classes), replace(asked, classes=classes))


@pytest.mark.slow
def test_an_export_whose_checkpoint_has_changed_is_refused_as_init(pretrained):
    bundle, _ = export(ExportSettings(str(pretrained)))
    path = pretrained / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes() + b"\0")  # another one now
    with pytest.raises(CheckpointError, match="was exported from a checkpoint that is neither next to it"):
        initial.load_initial(str(bundle.folder), None, None, None, 0)


def test_a_learning_rate_that_breaks_the_network_is_named(tmp_path):
    settings = FinetuneSettings(epochs=3, batch_size=8, lr=1e30)
    task = TaskData(settings, brightness({0: 20, 1: 20}, tmp_path), None)
    task.labels = np.random.default_rng(0).permutation(task.labels)  # what cannot be learnt costs 1e30 at once
    with pytest.raises(ValueError, match=r"the loss is not a number in epoch \d: give a smaller --lr"):
        train_classifier(small(), task, settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_share": 0.0}, r"--label-share is a share in \(0, 1\], not 0"),
        ({"label_share": 0.1, "labels_per_class": 3}, "give --label-share or --labels-per-class, not both"),
        ({"held_out": 1.0}, r"--held-out must be in \[0, 1\), not 1"),
        ({"lr": float("nan")}, "--lr must be above 0, not nan"),
        ({"name": "../x"}, "--name must be a folder name below runs/"),
    ],
)
def test_invalid_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        FinetuneSettings(**changes)


def test_the_command_line_overrides_its_preset():
    found = recipes.parse(["--preset", "v2", "--epochs", "30"])
    assert (found.mode, found.optimizer, found.epochs, found.weight_decay) == ("head", "lars", 30, 0.0)
    assert found.lr * 1024**0.5 == pytest.approx(0.16)  # as published


def test_the_default_learning_rate_is_small_for_a_pretrained_encoder():
    assert FinetuneSettings(init="runs/a").learning_rate < FinetuneSettings().learning_rate == 1.0
    assert FinetuneSettings(init="runs/a", mode="linear").learning_rate == 1.0
    assert FinetuneSettings(init="runs/a", lr=0.5).learning_rate == 0.5


@pytest.mark.slow
def test_labels_come_from_files_and_the_pictures_that_are_least_sure_come_next(pretrained, settings, capsys):
    source = open_source(settings().data)
    train = [picture for picture in source.pictures if picture.split == "train"]
    table = Path("to_label.csv")

    def write(label_of) -> None:
        with open(table, "w", encoding="utf-8") as file:
            write_rows(file, [("name", "label"), *((picture.name, label_of(i)) for i, picture in enumerate(train))])

    write(lambda i: "")
    with pytest.raises(DataError, match=r"to_label.csv has no label"):
        finetune(settings(labels=(str(table),)))
    write(lambda i: ("circle", "square")[i % 2] if i < 40 else "")
    asked = {"init": str(pretrained), "labels": (str(table),), "epochs": 1, "held_out": 0.0, "next": 5}
    run = finetune(settings(**asked))
    network, saved = classifier.load(run / "checkpoints" / "last.ckpt")
    assert saved["facts"]["images"] == 40 and saved["classifier"]["classes"] == ["circle", "square"]
    rows = [cells for _, cells in read_rows((run / "next.csv").read_text(encoding="utf-8"))]
    pixels = np.array(store.load(source, Preprocessing(16), "train").pixels)[40:]
    probabilities = embed(network, pixels).softmax(dim=1)
    margins = (probabilities[:, 0] - probabilities[:, 1]).abs().numpy()
    order = margins.argsort(kind="stable")[:5]
    assert [row["name"] for row in rows] == [train[40 + i].name for i in order]
    assert [row["path"] for row in rows] == [str(train[40 + i].path) for i in order]
    assert [row["suggestion"] for row in rows] == [
        saved["classifier"]["classes"][probabilities[i].argmax()] for i in order
    ]
    assert [row["margin"] for row in rows] == [f"{margins[i]:.3f}" for i in order]
    assert {row["label"] for row in rows} == {""}
    assert f"--labels to_label.csv {run / 'next.csv'}\n" in capsys.readouterr().out
    write(lambda i: ("circle", "square")[i % 2])
    assert not (finetune(settings(**asked, name="all")) / "next.csv").exists()  # all have a label
