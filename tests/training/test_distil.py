"""Small distillations: losses against plain loops, what a student learns, and which commands read its checkpoint."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from export.artifact import Preprocessing, load_bundle
from export.to_onnx import ExportSettings, export
from training import checkpoint, classifier, distil
from training.augment import AugmentSettings
from training.checkpoint import AtomicCheckpointIO, CheckpointError
from training.classifier import Classifier
from training.config import PretrainSettings
from training.data.sources import DataError, open_source
from training.data.store import load_splits
from training.distil import DistilSettings, NeighboursLoss, soft_cross_entropy
from training.encoders import ResNetEncoder, embed
from training.evaluation.features import EncoderError, megabytes, onnx_session, open_encoder
from training.finetune import finetune
from training.initial import load_initial
from training.pretrain import pretrain
from training.recipes import FinetuneSettings
from training.teacher import compare, notes, open_teacher

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")  # the exporter's own
PLAIN = AugmentSettings(crop_area=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def teacher(tmp_path):
    """An encoder's run, wider than its students."""
    settings = PretrainSettings(size_px=16, width=2)
    torch.manual_seed(1)
    weights = {f"encoder.{name}": value for name, value in ResNetEncoder("tiny", 2, 16).state_dict().items()}
    saved = {"settings": settings.to_dict(), "facts": {}, "history": [], "state_dict": weights}
    AtomicCheckpointIO().save_checkpoint(saved, tmp_path / "runs" / "small" / "checkpoints" / "last.ckpt")
    return tmp_path / "runs" / "small"


@pytest.fixture
def labelled(small_shapes, tmp_path):
    """A classifier's run whose probabilities are not uniform."""
    names = sorted({picture.label for picture in open_source(str(small_shapes)).pictures})
    torch.manual_seed(0)
    network = Classifier(ResNetEncoder("tiny", 1, 16), None, len(names))
    torch.nn.init.normal_(network.classifier.weight, std=3)
    path = tmp_path / "runs" / "labelled" / "checkpoints" / "last.ckpt"
    facts = {"data": "shapes", "images": 64, "epochs": 1, "commit": "", "after": {}}
    about = {"classes": names, "origin": "random weights", "settings": {}}
    classifier.save(path, network, PretrainSettings(size_px=16), facts, [], about)
    return path.parent.parent


@pytest.fixture
def settings(small_shapes):
    def make(teacher, **changes) -> DistilSettings:
        small = {"data": str(small_shapes), "name": "student", "epochs": 2, "batch_size": 16}
        return DistilSettings(**{"teacher": str(teacher), **small, **changes})

    return make


def test_the_loss_is_equation_2_and_minimal_for_the_teachers_own_logits():
    torch.manual_seed(0)
    student, teacher, tau = torch.randn(4, 3), torch.randn(4, 3), 0.7
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p_s, p_t = ([math.exp(value / tau) for value in row] for row in (s, t))
        for a, b in zip(p_s, p_t, strict=True):
            expected -= b / sum(p_t) * math.log(a / sum(p_s)) / 4
    assert soft_cross_entropy(student, teacher, tau).item() == pytest.approx(expected, rel=1e-5)
    student.requires_grad_()
    assert soft_cross_entropy(teacher, teacher, tau) < soft_cross_entropy(student, teacher, tau)
    (gradient,) = torch.autograd.grad(soft_cross_entropy(student, teacher, tau), student)
    expected = ((student / tau).softmax(dim=1) - (teacher / tau).softmax(dim=1)) / tau / 4
    torch.testing.assert_close(gradient, expected)


def test_the_neighbours_loss_compares_cosines_to_all_other_pictures_and_to_earlier_ones():
    torch.manual_seed(0)
    student, teacher, tau = torch.randn(9, 3), torch.randn(9, 7), 0.2

    def expected(pictures: range, others: range) -> float:
        """The mean over `pictures` of the cross-entropy of their cosines to `others`."""
        losses = []
        for i in pictures:
            ours, theirs = (
                [torch.nn.functional.cosine_similarity(h[i], h[j], dim=0).item() for j in others if j != i]
                for h in (student, teacher)
            )
            losses.append(soft_cross_entropy(torch.tensor([ours]), torch.tensor([theirs]), tau).item())
        return sum(losses) / len(losses)

    loss = NeighboursLoss()
    first = loss(student[:5], teacher[:5], tau).item()
    assert first == pytest.approx(expected(range(5), range(5)), rel=1e-5)
    assert loss(student[5:], teacher[5:], tau).item() == pytest.approx(expected(range(5, 9), range(9)), rel=1e-5)
    loss.forget()
    assert loss(student[:5], teacher[:5], tau).item() == first
    scaled = 9 * teacher @ torch.linalg.qr(torch.randn(7, 7))[0]  # turned and enlarged: the same neighbours
    assert NeighboursLoss()(student[:5], scaled[:5], tau).item() == pytest.approx(first, rel=1e-5)


def test_the_neighbours_loss_remembers_the_last_pictures_without_their_gradients(monkeypatch):
    monkeypatch.setattr(distil, "EARLIER", 6)
    loss, batches = NeighboursLoss(), [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    for h in batches:
        loss(h, h.detach(), 0.2).backward()
    expected = torch.nn.functional.normalize(torch.cat(batches)[-6:], dim=1)
    torch.testing.assert_close(loss.earlier[0], expected.detach())
    assert not loss.earlier[0].requires_grad


@pytest.mark.slow
def test_a_student_of_an_encoder_can_be_used_like_a_pretrained_run(settings, teacher, small_settings):
    run = distil.distil(settings(teacher))
    saved = checkpoint.load(checkpoint.find(run))
    assert [row["epoch"] for row in saved["history"]] == [1, 2]
    assert saved["facts"] == json.loads((run / "result.json").read_text())
    assert open_encoder(str(run))(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 128)  # the teacher's are 256
    again = pretrain(small_settings(name="again", init=str(run), epochs=1))
    assert checkpoint.settings_of(checkpoint.load(checkpoint.find(again))).init == str(run)
    adapted = finetune(FinetuneSettings(data=settings(teacher).data, name="adapted", init=str(run), epochs=1))
    assert classifier.load(checkpoint.find(adapted))[1]["classifier"]["origin"] == str(run)
    card = export(ExportSettings(str(run)))[0].card
    assert card.training["distillation"]["epochs"] == 2 and card.training["origin"].endswith("taught by small")
    assert "teacher" not in card.training["distillation"] and card.classes == []
    with pytest.raises(
        CheckpointError, match="student is not a pretraining run: start from it with --init runs/student"
    ):
        pretrain(small_settings(name="student", resume=True))


@pytest.mark.slow
def test_figures_of_teacher_and_student_are_reported(settings, teacher, capsys):
    facts = json.loads((distil.distil(settings(teacher)) / "result.json").read_text())
    student, out = facts["after"], capsys.readouterr().out
    weights = [sum(weight.numel() for weight in ResNetEncoder("tiny", n, 16).parameters()) * 4 / 1e6 for n in (1, 2)]
    assert student["MB"] == pytest.approx(weights[0])
    assert re.search(r"encoder +student +teacher\nMB +" + " +".join(f"{size:.4g}" for size in weights), out), out
    assert student["images/s"] > 0 and 0 <= student["knn"] <= 1 and student["queries"] == 20
    assert student["pictures"] == 20 and 0 <= student["agreement"] <= 1
    assert f"student and teacher share {student['agreement']:.1%} of the ten nearest" in out
    assert "before" not in facts and "verdict" not in facts


@pytest.mark.slow
def test_a_student_with_initial_weights_learns_gently_from_itself_at_a_larger_size(settings, teacher, capsys):
    start = checkpoint.encoder_of(checkpoint.load(checkpoint.find(teacher)))
    rates = {"gently": None, "too fast": 3.0}
    for name, lr in rates.items():
        run = distil.distil(settings(teacher, name=name, init=str(teacher), size_px=12, epochs=1, lr=lr))
        saved, weights = checkpoint.load(checkpoint.find(run)), dict(start.named_parameters())
        student, out = checkpoint.encoder_of(saved, result=True), capsys.readouterr().out
        moved = max((value - weights[key]).abs().max().item() for key, value in student.named_parameters())
        assert (0 < moved < 1e-3) if lr is None else moved > 0.1  # 4 steps of AdamW move a weight by 4 rates at most
        for key, value in student.named_buffers():
            assert torch.equal(value, start.get_buffer(key)) == (key != "centre"), "batch norm's statistics"
        assert re.search(r"encoder +start +student +teacher\n", out)
        assert f"the result is {saved['facts']['verdict']['sentence']}" in out
    pictures = load_splits(open_source(settings(teacher).data), Preprocessing(12))[0]
    mean = embed(start, np.array(pictures.pixels)).mean(dim=0)
    torch.testing.assert_close(saved["start"]["centre"], mean, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_training_brings_the_student_closer_to_its_teacher(settings, teacher):
    longer = settings(teacher, epochs=20, augment=PLAIN)  # the same views in every epoch: only learning moves the loss
    losses = [row["loss"] for row in checkpoint.load(checkpoint.find(distil.distil(longer)))["history"]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.02


@pytest.mark.slow
@pytest.mark.parametrize("better", [True, False])
def test_the_better_one_of_a_student_and_its_start_is_exported(settings, teacher, monkeypatch, capsys, better):
    figures = {"start": 0.4, "student": 0.9 if better else 0.1, "teacher": 1.0}
    rows = {name: {"knn": share, "queries": 500, "agreement": 0.5, "pictures": 500} for name, share in figures.items()}
    monkeypatch.setattr(distil, "compare", lambda *_: rows)
    run = distil.distil(settings(teacher, name="", init=str(teacher), size_px=12, epochs=1))
    assert run.name.endswith("-small-of-small")
    saved = checkpoint.load(checkpoint.find(run))
    assert saved["facts"]["verdict"]["better"] == better
    exported = export(ExportSettings(str(run)))[0]
    assert exported.card.figures["after"] == rows["student" if better else "start"]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    served = torch.from_numpy(onnx_session(exported.graph).run(None, {"pixels": pixels})[0])
    assert torch.allclose(embed(checkpoint.encoder_of(saved, result=True), pixels), served, atol=1e-4) == better
    assert ("distillation" in exported.card.training) == better == bool(exported.card.figures["before"])
    capsys.readouterr()
    for name in (str(exported.folder), str(run), str(checkpoint.find(run))):
        for h in (embed(load_initial(name, None, None, 12, 0).encoder, pixels), open_encoder(name).encode(pixels)):
            assert torch.allclose(h, served, atol=1e-4), f"{name} stands for the encoder that is exported"
    note = f"note: {run} stands for {teacher} as it was, which that run did not improve"
    assert (note in capsys.readouterr().out) != better
    if not better:
        kept, forced = exported.graph.read_bytes(), export(ExportSettings(str(run), force=True))[0]
        assert forced.graph.read_bytes() != kept and "distillation" in forced.card.training
        result = load_initial(str(forced.folder), None, None, 12, 0).encoder
        assert torch.equal(embed(result, pixels), embed(checkpoint.encoder_of(saved, result=True), pixels))
        assert export(ExportSettings(str(run)))[0].graph.read_bytes() == kept, "not what --force has exported"


@pytest.mark.slow
def test_a_student_of_a_classifier_agrees_with_it_and_keeps_its_classes(settings, labelled):
    run = distil.distil(settings(labelled, epochs=25, augment=PLAIN))
    _, saved = classifier.load(checkpoint.find(run))
    assert saved["classifier"]["classes"] == classifier.load(checkpoint.find(labelled))[1]["classifier"]["classes"]
    after = saved["facts"]["after"]
    guesses = []
    for name in (run, labelled):
        one = open_teacher(str(name))
        test = load_splits(open_source(settings(labelled).data), Preprocessing(16))[1]
        guesses.append(one.output(test.pixels.copy()).argmax(dim=1))
    assert after["agreement"] == pytest.approx((guesses[0] == guesses[1]).float().mean().item()) and (
        after["agreement"] > 0.5
    )
    names = [saved["classifier"]["classes"][i] for i in guesses[1]]
    right = np.mean([name == test.classes[label] for name, label in zip(names, test.labels, strict=True)])
    assert saved["facts"]["teacher"]["accuracy"] == pytest.approx(right)


@pytest.mark.slow
def test_a_classifiers_student_with_initial_weights_learns_at_the_full_rate(settings, teacher, labelled):
    run = distil.distil(settings(labelled, init=str(teacher), epochs=1))
    student, saved = classifier.load(checkpoint.find(run))
    assert student.classifier.weight.abs().max() > 1e-3, "it starts at 0, and AdamW at 1e-4 would move it by 4e-4"
    assert "verdict" not in saved["facts"]


@pytest.mark.slow
def test_a_bundle_gives_the_same_answers_as_its_run_and_its_student_is_exported_with_its_classes(settings, labelled):
    bundle = export(ExportSettings(str(labelled)))[0]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    by_run, by_bundle = (open_teacher(str(path)) for path in (labelled, bundle.folder))
    assert by_run.classes == by_bundle.classes == load_bundle(bundle.folder).card.classes
    torch.testing.assert_close(by_run.output(pixels), by_bundle.output(pixels), rtol=1e-4, atol=1e-4)
    run = distil.distil(settings(bundle.folder, epochs=1))
    assert export(ExportSettings(str(run)))[0].card.classes == by_run.classes


@pytest.mark.parametrize(("factor", "noted"), [(1.05, False), (2.0, True)])
def test_a_student_is_larger_only_if_more_than_its_file_is(teacher, settings, factor, noted):
    network, source = ResNetEncoder("tiny", 1, 12), open_source(settings(teacher).data)
    opened = open_teacher(str(teacher))
    small = dataclasses.replace(opened.encoder, megabytes=megabytes(network) / factor)
    said = notes(dataclasses.replace(opened, encoder=small), network, 12, source)
    assert any("larger than its teacher" in note for note in said) == noted


@pytest.mark.slow
def test_torchvision_models_can_teach_and_a_larger_student_gives_a_note(settings, capsys):
    run = distil.distil(settings("mobilenet_v3_small:random", epochs=1, encoder="resnet18", size_px=16, name=""))
    assert run.name.endswith("-resnet18-of-mobilenet_v3_small")
    out = capsys.readouterr().out
    assert "note: the student is larger than its teacher, 44.7 MB of weights against" in out
    assert "takes 224 px and these pictures have 24" in out
    assert open_encoder(str(run)).preprocessing.size_px == 16


@pytest.mark.slow
def test_a_student_with_a_larger_input_than_its_teacher_gives_a_note(settings, teacher, capsys):
    run = distil.distil(settings(teacher, size_px=24, epochs=1))
    assert "the student takes 24 px, but its teacher sees the pictures at 16 px only" in capsys.readouterr().out
    assert checkpoint.settings_of(checkpoint.load(checkpoint.find(run))).size_px == 24


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_student(settings, teacher, tmp_path, monkeypatch):
    whole = checkpoint.load(checkpoint.find(distil.distil(settings(teacher, name="whole", epochs=3))))
    monkeypatch.setattr(checkpoint, "EVERY_S", 0.0)
    steps, draw = [], distil.draw

    def stop(*arguments):
        steps.append(1)
        if len(steps) == 10:  # in the third epoch
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(distil, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        distil.distil(settings(teacher, epochs=3))
    student = tmp_path / "runs" / "student"  # what the page shows while it runs
    assert json.loads((student / "config.json").read_text())["epochs"] == 3
    assert (student / "metrics.csv").read_text().splitlines()[-1].startswith("2,")
    monkeypatch.setattr(distil, "draw", draw)
    with pytest.raises(CheckpointError, match="has an unfinished run: give --resume"):
        distil.distil(settings(teacher, epochs=3))
    run = distil.distil(settings(teacher, epochs=3, resume=True))
    again = checkpoint.load(checkpoint.find(run))
    assert len(again["history"]) == 3
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(again["state_dict"][key], value, rtol=0, atol=0)
    assert distil.distil(settings(teacher, epochs=3, resume=True)) == run
    with pytest.raises(CheckpointError, match=r"student was started without --lr: leave it out, or give another"):
        distil.distil(settings(teacher, epochs=3, lr=0.3, resume=True))
    with pytest.raises(CheckpointError, match="already contains a run: give another --name"):
        distil.distil(settings(teacher))


def test_an_unfinished_run_is_refused_before_any_picture_is_encoded(settings, teacher, tmp_path, monkeypatch):
    halfway = tmp_path / "runs" / "student" / "checkpoints" / checkpoint.HALFWAY
    halfway.parent.mkdir(parents=True)
    halfway.touch()
    monkeypatch.setattr(ResNetEncoder, "features", None)
    with pytest.raises(CheckpointError, match="has an unfinished run: give --resume"):
        distil.distil(settings(teacher, init=str(teacher)))


@pytest.fixture
def counted(teacher, monkeypatch) -> list[int]:
    """How many pictures the teacher has encoded, for each call."""
    encoded, opened = [], open_teacher(str(teacher))

    def encode(pixels: np.ndarray) -> torch.Tensor:
        encoded.append(len(pixels))
        return opened.encoder.encode(pixels)

    counting = dataclasses.replace(opened, encoder=dataclasses.replace(opened.encoder, encode=encode), output=encode)
    monkeypatch.setattr(distil, "open_teacher", lambda name: counting)
    monkeypatch.setattr("training.teacher.images_per_s", lambda *_: 1)
    return encoded


@pytest.mark.slow
def test_an_encoder_encodes_every_picture_once_however_many_epochs_there_are(settings, teacher, counted, monkeypatch):
    targets, step = [], distil.DistilStep
    monkeypatch.setattr(distil, "DistilStep", lambda *given: targets.append(given[-1]) or step(*given))
    run = distil.distil(settings(teacher, epochs=3))
    test, dimension = 20, 64  # found by kNN and compared; encoded to learn the dimension
    assert sum(counted) == 64 + 2 * test + dimension
    pixels = np.array(load_splits(open_source(settings(teacher).data), Preprocessing(16, 1.0))[0].pixels)
    h = open_teacher(str(teacher)).encoder.encode(pixels)
    torch.testing.assert_close(targets[0], h - h.mean(dim=0))
    student = checkpoint.encoder_of(checkpoint.load(checkpoint.find(run)))
    torch.testing.assert_close(embed(student, pixels).mean(dim=0), torch.zeros(128), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_comparison_uses_what_the_teacher_has_encoded(settings, teacher, counted):
    splits, opened = load_splits(open_source(settings(teacher).data), Preprocessing(16, 1.0)), distil.open_teacher("")
    h = opened.encoder.encode(np.array(splits[0].pixels))
    models = {"student": (open_teacher(str(teacher)), splits), "teacher": (opened, splits)}
    counts, found = [], []
    for taught in (None, h, -h):
        counted.clear()
        found.append(compare(models, taught=taught))
        counts.append(sum(counted))
    assert counts == [168, 104, 104]
    assert found[0] == found[1] != found[2]
    assert found[0]["student"]["knn"] == found[2]["student"]["knn"]


def test_the_seed_reaches_the_views_of_the_student(settings, teacher):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    encoder, opened, targets = ResNetEncoder("tiny", 1, 16), open_teacher(str(teacher)), torch.randn(8, 4)
    steps = [distil.DistilStep(opened, pixels, 16, settings(teacher, seed=seed), targets) for seed in (0, 1)]
    assert steps[0](encoder, np.arange(8), 0).item() != steps[1](encoder, np.arange(8), 0).item()


@pytest.mark.slow
def test_an_unusable_teacher_is_named(settings, teacher, tmp_path):
    with pytest.raises(EncoderError, match="nowhere is not a run, checkpoint, exported encoder or network"):
        distil.distil(settings("nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty contains no checkpoint"):
        distil.distil(settings(tmp_path / "empty"))
    saved = checkpoint.load(checkpoint.find(teacher))
    saved["state_dict"]["encoder.conv1.weight"][0] = math.nan
    AtomicCheckpointIO().save_checkpoint(saved, tmp_path / "nan.ckpt")
    with pytest.raises(EncoderError, match=r"nan.ckpt gives values that are NaN or infinite for "):
        distil.distil(settings(tmp_path / "nan.ckpt"))
    assert not (tmp_path / "runs" / "student" / "checkpoints").exists()
    with pytest.raises(CheckpointError, match="small is not a distillation: give another --name"):
        distil.distil(settings(teacher, name="small", resume=True))


def test_one_picture_is_too_few(settings, teacher, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "one" / "a.png")
    with pytest.raises(DataError, match="one has one picture that can be read"):
        distil.distil(settings(teacher, data=str(tmp_path / "one")))


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_is_reported(settings, teacher):
    with pytest.raises(ValueError, match=r"the loss is not a number in epoch \d: give a smaller --lr than 1e\+30"):
        distil.distil(settings(teacher, lr=1e30))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 0.0}, "--temperature must be above 0, not 0.0"),
        ({"lr": float("nan")}, "--lr must be above 0, not nan"),
        ({"minutes": 0.0}, "--minutes must be above 0, not 0.0"),
        ({"batch_size": 1}, "--batch-size must be at least 2, not 1"),
        ({"name": "../a"}, "--name must be a folder name below runs/, not '../a'"),
    ],
)
def test_invalid_settings_are_refused(changes, named):
    with pytest.raises(ValueError) as raised:
        DistilSettings(teacher="somebody", **changes)
    assert str(raised.value) == named
