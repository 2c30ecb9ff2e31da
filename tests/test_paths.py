"""Every path from a command line or a variable may begin with ~, also where no shell has replaced it."""

import dataclasses
import os
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

import demo
from export.paths import local_path, parse_settings, with_local_paths
from export.quantize import QuantizeSettings
from export.to_onnx import ExportSettings
from serving.access import Access
from serving.cli.main import COMMANDS, parse_command
from serving.collection.index import Index
from serving.collection.store import FileStore
from serving.inference.encoder import locate
from serving.runs import runs_folder
from training.ablate import AblateSettings
from training.config import PretrainSettings
from training.distil import DistilSettings
from training.evaluate import EvaluateSettings
from training.finetune import FinetuneSettings

ROOT = Path(__file__).parents[1]
SETTINGS = [
    AblateSettings,
    DistilSettings,
    EvaluateSettings,
    FinetuneSettings,
    PretrainSettings,
    ExportSettings,
    QuantizeSettings,
    demo.DemoSettings,
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def may_be_paths(kind: type) -> dict[str, object]:
    """~/x for every field that holds a text, a path, or several."""
    given = {}
    for name, hint in get_type_hints(kind).items():
        inner = [hint, *get_args(hint)]
        if any(get_origin(one) is tuple for one in inner) and str in {part for one in inner for part in get_args(one)}:
            given[name] = ("~/x", "y")
        elif str in inner or Path in inner:
            given[name] = Path("~/x") if Path in inner else "~/x"
    return given


def test_a_path_is_absolute_and_may_begin_with_the_home_folder(home, tmp_path):
    assert local_path("~/a/../b") == home / "b" and local_path(Path("~")) == home
    assert local_path("a/./b") == tmp_path / "a" / "b"
    assert local_path("/a/~/b") == Path("/a/~/b")


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_all_settings_of_the_commands_that_may_be_paths(kind, home):
    given = may_be_paths(kind)
    assert given

    @dataclasses.dataclass(frozen=True)
    class Given:  # without the checks of the settings
        __annotations__ = dict.fromkeys(given, object)

    read = with_local_paths(Given(**given))
    for name, value in given.items():
        expected = (str(home / "x"), "y") if isinstance(value, tuple) else type(value)(home / "x")
        assert getattr(read, name) == expected, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_of_twinview_passes_its_paths_through_the_one_place(command, home, tmp_path):
    function = parse_command.__globals__  # the module
    kind = _settings_of(command, function)
    words = []
    for field in dataclasses.fields(kind):
        hint = get_type_hints(kind)[field.name]
        if field.name in ("index", "data", "output", "input", "source", "target", "pictures", "query"):
            positional = field.name in ("input", "source", "target", "query") or (
                (field.name, command) in {("output", "index export"), ("data", "embed")}
            )
            words += ["~/x"] if positional else [f"--{field.name}=~/x"] if "tuple" not in str(hint) else []
    names = {"index drop": ["y"], "index rename": ["y", "z"], "index alias": ["y", "z"]}.get(command, [])
    _, settings = parse_command(command, [*words, *names])
    values = [value for value in vars(settings).values() if "x" in str(value)]
    assert values and not [value for value in values if str(value).startswith("~")]
    assert sum(str(value) == str(home / "x") for value in values) == len(words)


def _settings_of(command: str, names: dict) -> type:
    module, _, function = COMMANDS[command][0].partition(":")
    return get_type_hints(getattr(names["import_module"](module), function))["settings"]


def test_no_program_reads_its_command_line_anywhere_else():
    programs = [
        ROOT / "demo.py",
        *(file for name in ("training", "export", "serving") for file in (ROOT / name).rglob("*.py")),
    ]
    calls = {str(file.relative_to(ROOT)) for file in programs if "tyro.cli(" in file.read_text()}
    assert calls == {"export/paths.py"} and len(programs) > 100


def test_no_other_module_replaces_the_home_folder():
    files = [
        ROOT / "demo.py",
        *(f for name in ("training", "export", "serving", "ui", "benchmarks") for f in (ROOT / name).rglob("*.py")),
    ]
    assert {str(file.relative_to(ROOT)) for file in files if "expanduser" in file.read_text()} == {"export/paths.py"}


def test_collections_lie_where_their_variable_says(home, tmp_path, monkeypatch):
    assert FileStore("~/idx").local == home / "idx" == FileStore("file://~/idx").local
    assert FileStore("s3://bucket/~x").local is None
    Index("~/idx", "enc", 2).store.write("thumbnails/a", b"x")
    assert (home / "idx" / "thumbnails" / "a").read_bytes() == b"x"
    assert os.listdir(tmp_path) == ["home"]


def test_runs_keys_and_encoders_lie_where_their_variables_say(home, monkeypatch):
    monkeypatch.setenv("TWINVIEW_RUNS", "~/runs")
    assert runs_folder() == home / "runs"
    (home / "keys").write_text("secret")
    assert Access.from_environment({"TWINVIEW_API_KEYS_FILE": "~/keys"}).keys.find(b"secret")
    (home / "run" / "encoder").mkdir(parents=True)
    assert locate("~/run") == home / "run" / "encoder"


def test_an_option_of_a_command_is_read_like_that(home):
    @dataclasses.dataclass(frozen=True)
    class Settings:
        output: Path = Path("~/default")
        name: str = "a~b"

    assert parse_settings(Settings, []) == Settings(home / "default", "a~b")
    assert parse_settings(Settings, ["--output=~/v.npy"]).output == home / "v.npy"


@dataclasses.dataclass(frozen=True)
class MaybeNone:
    minutes: float | None = None
    """How long."""
    compile: bool | None = None
    encoder: str | None = None


def test_help_shows_a_setting_that_may_be_none_by_its_other_type(capsys):
    with pytest.raises(SystemExit):
        parse_settings(MaybeNone, ["--help"])
    shown = capsys.readouterr().out
    assert "None" not in shown and "--minutes FLOAT" in shown and "(default: none)" in shown


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], MaybeNone()),
        (["--minutes", "2.5", "--compile", "False", "--encoder", "lite0"], MaybeNone(2.5, False, "lite0")),
        (["--minutes", "none", "--compile", "none", "--encoder", "None"], MaybeNone()),
    ],
)
def test_settings_that_may_be_none_are_read(words, settings):
    assert parse_settings(MaybeNone, words) == settings


@pytest.mark.parametrize("words", [["--minutes", "x"], ["--compile", "maybe"]])
def test_a_wrong_value_of_a_setting_that_may_be_none_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_settings(MaybeNone, words)
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err
