"""The demo: which commands it runs, in which order, and which encoder it serves."""

import contextlib
import json
import os
from pathlib import Path

import pytest

import demo
from demo import RUNS, DemoSettings, best_of, collection_name, with_lite0
from export.artifact import CARD


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that were run, as words. Exports and comparisons leave their files; `found` decides the best."""
    monkeypatch.chdir(tmp_path)
    ran, found = [], {"nothing": 0.3, "lite0": 0.7, "adapted": 0.8, "distilled": 0.6}

    def run(*words: str, quiet: bool = False) -> None:
        ran.append(words)
        if words[0] == "export/to_onnx.py":
            folder = Path(words[words.index("--out") + 1]) if "--out" in words else Path(words[1]) / "encoder"
            folder.mkdir(parents=True)
            epochs = 0 if "lite0" in words else 3
            (folder / CARD).write_text(json.dumps({"training": {"epochs": epochs}}))
        if words[0] == "training/evaluate.py":
            encoders = words[1 : words.index("--data")]
            rows = [{"encoder": name, "knn": found.get(Path(name).parts[1].split("-")[0], 0)} for name in encoders]
            rows[0] |= {"knn": 0.1, "asked": 40}  # untrained
            Path(words[words.index("--out") + 1]).with_suffix(".json").write_text(json.dumps({"rows": rows}))

    @contextlib.contextmanager
    def service(settings, encoders, collection):
        ran.append(("service", collection, *(encoder.parent.name for encoder in encoders)))
        yield lambda: ran.append(("waits",))
        ran.append(("stops",))

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "service", service)
    return ran


def names(commands) -> list[str]:
    return [" ".join(words[:1] if words[0] != "service" else words) for words in commands]


def test_the_page_is_there_before_anything_is_trained_and_the_best_encoder_is_served_in_the_end(commands, capsys):
    with_lite0(DemoSettings(data="here"), "here", 12, 2)
    assert names(commands)[:3] == ["export/to_onnx.py", "serving/bulk.py", "service here lite0-here"]
    assert commands[0][:4] == ("export/to_onnx.py", "lite0", "--centre-on", "here")
    assert names(commands)[-5:] == [
        *("training/evaluate.py", "stops"),  # until the encoders have been compared
        *("service here adapted-here nothing-here lite0-here distilled-here", "waits", "stops"),
    ]
    trained = [words for words in commands if words[0].startswith("training/") and "evaluate" not in words[0]]
    assert [words[0] for words in trained] == ["training/pretrain.py"] * 2 + ["training/distil.py"]
    assert "adapt" in trained[1] and "adapt" not in trained[0]
    indexed = [words[words.index("--encoder") + 1] for words in commands if words[0] == "serving/bulk.py"]
    assert sorted(indexed) == sorted(
        f"runs/{kind}-here/encoder" for kind in ("lite0", "nothing", "adapted", "distilled")
    )
    table = capsys.readouterr().out
    assert "kNN accuracy on 40 pictures" in table
    assert "adapted       80.0%   the best, which is served\n" in table and "untrained     10.0%" in table


def test_a_second_call_trains_and_compares_nothing_and_indexes_new_pictures_with_every_encoder(commands, capsys):
    with_lite0(DemoSettings(data="here"), "here", 12, 2)
    commands.clear()
    with_lite0(DemoSettings(data="here"), "here", 13, 2)
    assert names(commands) == [
        *["serving/bulk.py"] * 4,
        "service here adapted-here nothing-here lite0-here distilled-here",
        *("waits", "stops"),
    ]
    assert capsys.readouterr().out.count("adapted       80.0%   the best") == 2


@pytest.mark.parametrize(("pictures", "settings"), [(24, {}), (6, {}), (12, {"again": True})])
def test_encoders_are_made_again_when_much_has_changed_and_when_asked(commands, pictures, settings):
    with_lite0(DemoSettings(data="here"), "here", 12, 2)
    first = names(commands)
    commands.clear()
    with_lite0(DemoSettings(data="here", **settings), "here", pictures, 2)
    assert names(commands) == first
    assert (Path("runs/lite0-here-of-12-pictures/encoder") / CARD).exists()


def test_a_changed_encoder_is_compared_again(commands):
    with_lite0(DemoSettings(data="here"), "here", 12, 2)
    commands.clear()
    now = Path("runs/comparison-here.json").stat().st_mtime
    os.utime(Path("runs/distilled-here/encoder") / CARD, (now + 1, now + 1))
    with_lite0(DemoSettings(data="here"), "here", 12, 2)
    assert "training/evaluate.py" in names(commands) and "training/pretrain.py" not in names(commands)


def test_an_adapted_encoder_that_was_not_better_is_said_to_be_the_one_as_bought(commands, capsys):
    encoders = {kind: RUNS / f"{prefix}-x" / "encoder" for kind, prefix in demo.KINDS.items() if prefix}
    for epochs, words in ((0, "adapting did not help: the weights as published, without their crop"), (3, "")):
        encoders["adapted"].mkdir(parents=True, exist_ok=True)
        (encoders["adapted"] / CARD).write_text(json.dumps({"training": {"epochs": epochs}}))
        rows = [{"encoder": name, "knn": 0.5, "asked": 9} for name in demo.names_of(encoders).values()]
        (RUNS / "comparison-x.json").write_text(json.dumps({"rows": rows}))
        best_of(RUNS / "comparison-x.json", encoders)
        assert (
            capsys.readouterr().out.split("adapted")[1].splitlines()[0] == f"       50.0%{'   ' * bool(words)}{words}"
        )


def test_without_labels_the_pictures_found_again_decide(commands, capsys):
    encoders = {kind: RUNS / f"{prefix}-x" / "encoder" for kind, prefix in demo.KINDS.items() if prefix}
    encoders["adapted"].mkdir(parents=True)
    (encoders["adapted"] / CARD).write_text('{"training": {"epochs": 3}}')
    figures = {"untrained": 0.0, "from nothing": 0.8, "as published": 0.5, "adapted": 0.4, "distilled": 0.9}
    called = demo.names_of(encoders)
    rows = [{"encoder": called[kind], "found_again": value, "judged": 80} for kind, value in figures.items()]
    (RUNS / "comparison-x.json").write_text(json.dumps({"rows": rows}))
    assert best_of(RUNS / "comparison-x.json", encoders) == "as published"
    table = capsys.readouterr().out
    assert (
        "score of finding 80 pictures by a changed view of each" in table and "as published  50.0%   the best" in table
    )


def test_folders_of_equal_names_have_collections_of_their_own(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "my pictures").mkdir(parents=True)
    one, other = (collection_name(str(tmp_path / parent / "my pictures"), "my pictures") for parent in ("a", "b"))
    assert one != other and one.startswith("my-pictures-") and len(one) <= 64
    assert collection_name("shapes", "shapes") == "shapes"


def test_the_name_of_a_collection_keeps_letters_without_their_accents(tmp_path):
    for name, plain in (("Fotos-für-Mémé", "Fotos-fur-Meme-"), ("写真", "pictures-")):
        (tmp_path / name).mkdir()
        assert collection_name(str(tmp_path / name), name).startswith(plain)


def test_of_equal_encoders_the_one_as_bought_is_served_and_every_class_is_compared(commands, monkeypatch):
    with_lite0(DemoSettings(data="here"), "here", 12, 700)
    evaluated = next(words for words in commands if words[0] == "training/evaluate.py")
    assert evaluated[evaluated.index("--limit") + 1] == "14000"
    encoders = {kind: RUNS / f"{prefix}-here" / "encoder" for kind, prefix in demo.KINDS.items() if prefix}
    rows = [{"encoder": name, "knn": 0.5, "asked": 9} for name in demo.names_of(encoders).values()]
    (RUNS / "comparison-here.json").write_text(json.dumps({"rows": rows}))
    assert best_of(RUNS / "comparison-here.json", encoders) == "as published"


def test_an_unfinished_training_on_other_pictures_is_put_aside_and_kept(tmp_path, capsys):
    run = tmp_path / "nothing-x"
    demo.put_aside_if_outdated(run, 12, again=False)
    demo.note_pictures(run, 12)
    (run / "config.json").touch()
    for again in (False, True):
        demo.put_aside_if_outdated(run, 12, again)
        assert (run / "config.json").exists() and capsys.readouterr().out == ""
    demo.put_aside_if_outdated(run, 13, again=False)
    assert not run.exists() and (tmp_path / "nothing-x-of-12-pictures" / "config.json").exists()
    assert "was made with 12 pictures and begins again with 13" in capsys.readouterr().out


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


def test_the_page_goes_on_with_the_first_encoder_when_training_fails(commands, monkeypatch, capsys):
    def fails(*command: str, quiet: bool = False) -> None:
        if command[0] == "training/pretrain.py":
            raise SystemExit(1)
        ran(*command, quiet=quiet)

    ran = demo.run
    monkeypatch.setattr(demo, "run", fails)
    with pytest.raises(SystemExit):
        with_lite0(DemoSettings(data="pets"), "pets-1", 50, 3)
    assert commands[-2:] == [("service", "pets-1", "lite0-pets-1"), ("waits",)]
    assert "That failed, for the reason above. The page goes on with lite0 until Ctrl-C." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        with_lite0(DemoSettings(data="pets", check=True), "pets-1", 50, 3)
    assert commands[-1] == ("service", "pets-1", "lite0-pets-1")  # a check does not wait


@pytest.mark.parametrize(("ends", "as_"), [("exit(130)", KeyboardInterrupt), ("exit(3)", SystemExit)])
def test_a_command_that_fails_or_is_interrupted_ends_the_demo(ends, as_):
    with pytest.raises(as_):
        demo.run("-c", ends)


def test_a_folder_is_named_from_where_the_demo_is_called(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(demo, "demo", lambda settings: given.append(settings.data))
    for data in ("pictures", "shapes", "none/*.tar"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["demo.py", "--data", data])
        demo.main()
    assert given == [str(tmp_path / "pictures"), "shapes", "none/*.tar"]
