"""Sentences of comparisons: what is not distinguishable is not called better or worse."""

import shlex
from pathlib import Path

import pytest

from export.suggest import command
from training.evaluation import words
from training.pretrain import is_better, outcomes, pretrain

ROOT = Path(__file__).parents[2]


def test_the_interval_of_a_difference_is_that_of_two_shares():
    low, high = words.difference(0.5, 0.6, 100)
    assert (low, high) == pytest.approx((0.1 - 1.96 * 0.07, 0.1 + 1.96 * 0.07), abs=1e-12)
    assert words.difference(0.667, 0.667, 30)[0] < 0 < words.difference(0.667, 0.667, 30)[1]


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ((-0.07, 0.013), "tiny is not distinguishable from raw pixels: kNN accuracy 60.0% against 50.0%"),
        ((0.0, 0.0), "tiny is not distinguishable from raw pixels: kNN accuracy 60.0% against 50.0%"),
        (
            (0.06, 0.14),
            "tiny is better than raw pixels: kNN accuracy 60.0% against 50.0%, by 10.0 points (6.0 to 14.0)",
        ),
    ],
)
def test_a_comparison_is_clear_only_if_its_interval_leaves_out_0(limits, sentence):
    assert words.compared("tiny", "raw pixels", "kNN accuracy", (0.6, 0.5), limits) == sentence


def test_a_worse_encoder_is_called_worse():
    sentence = words.compared("tiny", "lite0", "kNN accuracy", (0.5, 0.6), (-0.14, -0.06))
    assert sentence == "tiny is worse than lite0: kNN accuracy 50.0% against 60.0%, by 10.0 points (6.0 to 14.0)"


@pytest.mark.parametrize(
    ("before", "after", "better", "words_of_it"),
    [
        (
            0.667,
            0.667,
            False,
            "training changed nothing that 372 pictures can show: kNN accuracy 66.7% before, 66.7% after",
        ),
        (0.667, 0.68, False, "training changed nothing that 372 pictures can show"),
        (0.24, 0.57, True, "the result is better than its start: kNN accuracy 57.0% against 24.0%, by 33.0 points ("),
        (0.57, 0.24, False, "the result is worse than its start"),
    ],
)
def test_training_that_changed_nothing_says_so(before, after, better, words_of_it):
    found = words.trained({"knn": before}, {"knn": after, "queries": 372})
    assert found[0] == better and words_of_it in found[1]


@pytest.mark.slow
@pytest.mark.parametrize("better", [True, False])
def test_only_a_better_result_is_suggested_for_export(small_settings, tmp_path, monkeypatch, capsys, better):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.pretrain.words.trained", lambda before, after: (better, "as the test says"))
    pretrain(small_settings(epochs=1))
    printed = capsys.readouterr().out
    assert "as the test says\n" in printed
    assert (f"next: python {ROOT}/export/to_onnx.py runs/small\n" in printed) == better


def test_a_run_has_one_verdict():
    """One of its own, if it is judged against the encoder that it started from."""
    facts = {"before": {"knn": 0.24}, "after": {"knn": 0.57, "queries": 372}}
    assert [sentence[:27] for sentence in outcomes(facts)] == ["the result is better than i"]
    verdict = {"verdict": {"better": True, "sentence": "not distinguishable from lite0"}}
    assert list(outcomes(facts | verdict)) == ["the result is not distinguishable from lite0"]


@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("better", [True, False])
def test_with_labels_a_result_is_better_by_them_and_else_by_its_verdict(judged, better):
    other = {"verdict": {"better": not better, "sentence": ""}} if judged else {}
    after = 0.57 if better else 0.25
    assert is_better({"before": {"knn": 0.24}, "after": {"knn": after, "queries": 372}} | other) == better
    if judged:
        without = {"before": {"views_matched": 0.2}, "after": {"views_matched": 0.9, "pictures": 500}}
        assert is_better(without | {"verdict": {"better": better, "sentence": ""}}) == better


def test_a_suggested_command_works_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command("export/to_onnx.py", Path("runs/a b")) == "python export/to_onnx.py 'runs/a b'"
    assert command("export/to_onnx.py", ROOT / "runs" / "a") == "python export/to_onnx.py runs/a"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(command("export/to_onnx.py", Path("runs/a"))) == [
        "python",
        str(ROOT / "export" / "to_onnx.py"),
        "runs/a",
    ]
