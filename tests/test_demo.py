"""The demo: which commands it runs, in which order, and which encoder it serves."""

import contextlib
import json
from pathlib import Path

import pytest

import demo
from demo import RUNS, DemoSettings, collection_name, compare, with_lite0


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that were run, as words. Exports and comparisons leave their files; `found` decides the best."""
    monkeypatch.chdir(tmp_path)
    ran, found = [], {"nothing": 0.3, "lite0": 0.7, "adapted": 0.8, "distilled": 0.6}

    def run(*words: str) -> None:
        ran.append(words)
        if words[0] == "export/to_onnx.py":
            folder = Path(words[words.index("--out") + 1]) if "--out" in words else Path(words[1]) / "encoder"
            folder.mkdir(parents=True)
            (folder / "model_card.json").touch()
        if words[0] == "training/evaluate.py":
            encoders = words[1 : words.index("--data")]
            rows = [{"encoder": name, "knn": found.get(Path(name).parts[1].split("-")[0], 0)} for name in encoders]
            rows[0]["knn"] = 0.1  # untrained
            Path(words[words.index("--out") + 1]).with_suffix(".json").write_text(json.dumps({"rows": rows}))

    @contextlib.contextmanager
    def service(settings, encoders, collection):
        ran.append(("service", collection, *(encoder.parent.name for encoder in encoders)))
        yield lambda: ran.append(("waits",))

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "service", service)
    return ran


def names(commands) -> list[str]:
    return [" ".join(words[:1] if words[0] != "service" else words) for words in commands]


def test_the_page_is_there_before_anything_is_trained_and_the_best_encoder_is_served_in_the_end(commands, capsys):
    with_lite0(DemoSettings(data="here"), "here", 12, 2)
    assert names(commands)[:3] == ["export/to_onnx.py", "serving/bulk.py", "service here lite0-here"]
    assert commands[0][:4] == ("export/to_onnx.py", "lite0", "--centre-on", "here")
    assert names(commands)[-2:] == ["service here adapted-here nothing-here lite0-here distilled-here", "waits"]
    trained = [words for words in commands if words[0].startswith("training/") and "evaluate" not in words[0]]
    assert [words[0] for words in trained] == ["training/pretrain.py"] * 2 + ["training/distil.py"]
    assert "adapt" in trained[1] and "adapt" not in trained[0]
    indexed = [words[words.index("--encoder") + 1] for words in commands if words[0] == "serving/bulk.py"]
    assert sorted(indexed) == sorted(
        f"runs/{kind}-here/encoder" for kind in ("lite0", "nothing", "adapted", "distilled")
    )
    table = capsys.readouterr().out
    assert "adapted       80.0%   the best, which is served" in table and "untrained     10.0%" in table


def test_a_second_call_trains_nothing_and_indexes_new_pictures_with_every_encoder(commands):
    with_lite0(DemoSettings(data="here"), "here", 12, 2)
    commands.clear()
    with_lite0(DemoSettings(data="here"), "here", 13, 2)
    assert names(commands) == [
        *["serving/bulk.py"] * 4,
        "training/evaluate.py",
        "service here adapted-here nothing-here lite0-here distilled-here",
        "waits",
    ]


def test_without_labels_the_pictures_found_again_decide(commands, monkeypatch, tmp_path, capsys):
    encoders = {kind: RUNS / f"{prefix}-x" / "encoder" for kind, prefix in demo.KINDS.items() if prefix}
    figures = {"untrained": 0.0, "from nothing": 0.2, "as bought": 0.5, "adapted": 0.4, "distilled": 0.1}

    def run(*words: str) -> None:
        rows = [{"encoder": name, "found_again": figures[kind]} for name, kind in zip(words[1:6], figures, strict=True)]
        RUNS.mkdir(exist_ok=True)
        (RUNS / "comparison-x.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(demo, "run", run)
    assert compare(DemoSettings(), "x", encoders, 2) == "as bought"
    assert "as bought     50.0%   the best" in capsys.readouterr().out


def test_folders_of_equal_names_have_collections_of_their_own(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "my pictures").mkdir(parents=True)
    one, other = (collection_name(str(tmp_path / parent / "my pictures"), "my pictures") for parent in ("a", "b"))
    assert one != other and one.startswith("my-pictures-") and len(one) <= 64
    assert collection_name("shapes", "shapes") == "shapes"


def test_of_equal_encoders_the_one_as_bought_is_served_and_every_class_is_compared(commands, monkeypatch):
    encoders = {kind: RUNS / f"{prefix}-x" / "encoder" for kind, prefix in demo.KINDS.items() if prefix}
    limits = []

    def run(*words: str) -> None:
        limits.append(int(words[words.index("--limit") + 1]))
        RUNS.mkdir(exist_ok=True)
        (RUNS / "comparison-x.json").write_text(json.dumps({"rows": [{"encoder": n, "knn": 0.5} for n in words[1:6]]}))

    monkeypatch.setattr(demo, "run", run)
    assert compare(DemoSettings(), "x", encoders, 3) == compare(DemoSettings(), "x", encoders, 700) == "as bought"
    assert limits == [2000, 14_000]


def test_an_unfinished_training_on_other_pictures_is_put_aside_and_kept(tmp_path, capsys):
    run = tmp_path / "nothing-x"
    demo.put_aside_if_changed(run, 12)
    (run / "config.json").touch()
    demo.put_aside_if_changed(run, 12)
    assert (run / "config.json").exists() and capsys.readouterr().out == ""
    demo.put_aside_if_changed(run, 13)
    assert not (run / "config.json").exists() and (run / "pictures.txt").read_text() == "13"
    assert (tmp_path / "nothing-x-of-12-pictures" / "config.json").exists()
    assert "there are 13 pictures now" in capsys.readouterr().out


def test_ctrl_c_while_encoders_are_trained_ends_the_demo_and_stops_the_service(monkeypatch):
    class Process:
        stopped = False

        def poll(self):
            return None

        def send_signal(self, number):
            self.stopped = True

        def wait(self, timeout=None):
            return 0

    process = Process()
    monkeypatch.setattr(demo.subprocess, "Popen", lambda *arguments, **options: process)
    monkeypatch.setattr(demo, "wait_until_ready", lambda client, process: None)
    with pytest.raises(KeyboardInterrupt), demo.service(DemoSettings(), [Path("encoder")], "here"):
        raise KeyboardInterrupt
    assert process.stopped
