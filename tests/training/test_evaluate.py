"""Small evaluations: what they write, with and without labels, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.artifact import load_bundle
from export.to_onnx import ExportSettings, export
from training.data.sources import DataError
from training.evaluate import EvaluateSettings, _file_stem, evaluate
from training.evaluation import gallery


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def folder(root, counts, colour=True):
    """Noisy pictures, one colour per class. counts: {path below root: number of pictures}."""
    rng = np.random.default_rng(0)
    for place, (inside, n) in enumerate(counts.items()):
        (root / inside).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 60, (12, 12, 3))
            pixels[:, :, sum(map(ord, inside.split("/")[-1])) % 3 if colour else 0] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / inside / f"{place}-{i}.png")
    return str(root)


@pytest.fixture
def colours(tmp_path):
    """a, b and c are red, green and blue."""
    return folder(tmp_path / "colours", {f"{s}/{c}": n for s, n in (("train", 20), ("test", 5)) for c in "abc"})


@pytest.mark.slow
def test_classes_of_different_colour_are_separated_by_pixels_and_everything_is_written(colours, capsys, tmp_path):
    result = evaluate(EvaluateSettings(("pixels", "pixels"), data=colours, size_px=8, out=tmp_path / "o" / "judged"))
    row = result["rows"][0]
    assert (row["known"], row["asked"], row["dimension"], row["k"]) == (60, 15, 192, 1)
    for name in ("knn", "linear", "precision@1", "precision@10", "recall@5", "mAP"):
        assert row[name] == 1 and row[f"{name} interval"] == (1, 1)
    assert result["rows"][1]["knn over first"] == 0
    same = "raw pixels is not distinguishable from raw pixels: kNN accuracy 100.0% against 100.0%"
    assert row["verdict"] == same
    assert result["details"]["pixels"]["per class"] == {"a": 1, "b": 1, "c": 1}
    assert json.loads((tmp_path / "o" / "judged.json").read_text())["rows"][0]["mAP"] == 1
    with Image.open(tmp_path / "o" / "judged.png") as picture:
        assert picture.width > 1000
    printed = capsys.readouterr().out
    assert (
        "kNN accuracy" in printed
        and "near-duplicate cosine" in printed
        and "100.0% (100.0% to 100.0%)" in printed
        and "temperature" in printed
        and "kNN over first encoder" in printed
        and printed.endswith(f"\n{same}\n")
    )
    (over_first,) = (line for line in printed.splitlines() if line.startswith("kNN over first"))
    assert over_first.split("  ")[-1].strip() == "not distinguishable"


@pytest.mark.slow
def test_an_encoder_alone_is_compared_with_guessing(colours, capsys):
    row = evaluate(EvaluateSettings(("pixels",), data=colours, size_px=8, linear="none"))["rows"][0]
    assert row["verdict"].startswith(
        "raw pixels is better than guessing the largest class: kNN accuracy 100.0% against 33"
    )
    assert capsys.readouterr().out.endswith(row["verdict"] + "\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_card_of_an_exported_encoder_gets_what_was_measured(colours, tmp_path):
    encoder = export(ExportSettings("timm:test_resnet:random", out=tmp_path / "encoder", size_px=32))[0].folder
    heap = folder(tmp_path / "heap", {".": 5})
    for data, names in (
        (colours, ("knn", "chance", "k", "queries", "bank", "pixels", "verdict")),
        (heap, ("found_first", "chance", "judged", "pixels", "verdict")),
    ):
        settings = EvaluateSettings((str(encoder), "pixels"), data=data, size_px=8, linear="none")
        row, pixels = evaluate(settings)["rows"]
        row |= {"data": Path(data).name, "pixels": pixels[names[0]]}
        row |= (
            {"queries": row["asked"], "bank": row["known"], "chance": row["largest class"]}
            if "knn" in row
            else {"chance": 1 / 5}
        )
        assert " than raw pixels" in row["verdict"] or " from raw pixels" in row["verdict"]
        assert str(tmp_path) not in row["verdict"]  # a card names no folder of this machine
        assert load_bundle(encoder).card.figures["measured"] == {name: row[name] for name in ("data", *names)}


@pytest.mark.slow
def test_wrong_labels_are_counted_as_wrong(tmp_path):
    counts = {"train/a": 20, "train/d": 20, "test/a": 5, "test/d": 5}  # a and d share their colour
    row = evaluate(EvaluateSettings(("pixels",), data=folder(tmp_path / "same", counts), size_px=8))["rows"][0]
    assert 0.1 <= row["knn"] <= 0.9
    low, high = row["knn interval"]
    assert low < row["knn"] < high


@pytest.mark.slow
def test_without_a_test_split_a_fifth_of_every_class_are_queries(tmp_path, capsys):
    data = folder(tmp_path / "flat", {"a": 20, "b": 10, "c": 1})
    row = evaluate(EvaluateSettings(("pixels",), data=data, size_px=8, linear="none"))["rows"][0]
    assert (row["asked"], row["known"], row["knn"]) == (6, 25, 1.0)
    assert "linear" not in row
    assert "no queries of c: the only picture of a class is not held out" in capsys.readouterr().out


@pytest.mark.slow
def test_linear_evaluation_by_the_published_recipe(colours):
    row = evaluate(EvaluateSettings(("pixels",), data=colours, size_px=8, linear="sgd"))["rows"][0]
    assert row["linear"] == 1 and "decay" not in row


@pytest.mark.slow
def test_without_labels_pictures_are_compared_and_near_duplicates_named(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "heap").mkdir()
    for i in range(12):
        blocks = rng.integers(0, 256, (3, 3, 3)).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(blocks).save(tmp_path / "heap" / f"{i:02d}.png")
    Image.open(tmp_path / "heap" / "04.png").save(tmp_path / "heap" / "copy.png")
    result = evaluate(EvaluateSettings(("pixels",), data=str(tmp_path / "heap"), size_px=24))
    row = result["rows"][0]
    assert row["pictures"] == 13
    assert "knn" not in row
    assert row["near-duplicates"] == pytest.approx(2 / 13)
    assert 1 < row["effective rank"] < 13 and row["alignment"] > 0 > row["uniformity"]
    assert result["details"]["pixels"]["nearest pairs"] == [{"a": "04.png", "b": "copy.png", "cosine": 1.0}]
    assert (tmp_path / "runs" / "evaluation" / "heap-pixels.png").exists()


@pytest.mark.slow
def test_a_single_class_is_treated_as_no_labels(tmp_path, capsys):
    data = folder(tmp_path / "layout", {"train/images": 6, "test/images": 3})
    row = evaluate(EvaluateSettings(("pixels",), data=data, size_px=8))["rows"][0]
    assert row["pictures"] == 6 and "knn" not in row and "alignment" in row
    assert "images is the only class in the training split, so the labels are not used" in capsys.readouterr().out


@pytest.mark.slow
def test_classes_of_one_picture_are_treated_as_no_labels(tmp_path, capsys):
    data = folder(tmp_path / "products", {"a": 1, "b": 1, "c": 1})
    row = evaluate(EvaluateSettings(("pixels",), data=data, size_px=8))["rows"][0]
    assert row["pictures"] == 3 and "knn" not in row and "alignment" in row
    assert "each class has one picture, so the labels are not used" in capsys.readouterr().out


def test_results_of_different_runs_have_different_file_names(tmp_path):
    for name in ("a", "v1.5"):
        (tmp_path / "runs" / name / "encoder").mkdir(parents=True)
        (tmp_path / "runs" / name / "encoder" / "model_card.json").write_text("{}")
    names = [str(tmp_path / "runs" / name) for name in ("a/encoder", "v1.5/encoder", "v1.5")]
    assert [_file_stem(name) for name in names] == ["a-encoder", "v1.5-encoder", "v1.5"]
    assert [_file_stem(name) for name in ("resnet50:random", "pixels", "runs/x/last.ckpt")] == [
        "resnet50",
        "pixels",
        "last",
    ]


def test_classes_without_training_pictures_are_named(tmp_path):
    data = folder(tmp_path / "bad", {"train/a": 3, "train/b": 3, "test/c": 2})
    with pytest.raises(DataError, match="has pictures of c in its split test and none of it in train"):
        evaluate(EvaluateSettings(("pixels",), data=data, size_px=8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoders": ()}, "no encoder was given"),
        ({"temperature": float("nan")}, "--temperature must be above 0, not nan"),
        ({"k": 0}, "--k must be at least 1, not 0"),
        ({"k": 61}, "--k must be at most the bank's 60 pictures, not 61"),
        ({"retrieved": (5, 0)}, "--retrieved must be at least 1, not 0"),
        ({"size_px": 2}, "--size-px must be at least 8"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
    ],
)
def test_invalid_settings_are_refused(colours, changes, words):
    with pytest.raises(ValueError, match=words):
        evaluate(EvaluateSettings(**{"encoders": ("pixels",), "data": colours} | changes))


def test_a_confusion_matrix_counts_true_and_predicted_classes():
    true, predicted = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 2])
    assert gallery.confusion(true, predicted, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
