"""What the documents say about files, commands and options is true."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from export.quantize import QuantizeSettings
from export.to_onnx import ExportSettings
from serving.bulk import BulkSettings
from serving.cli import main
from training.ablate import AblateSettings
from training.config import PRESETS, PretrainSettings
from training.distil import DistilSettings
from training.evaluate import EvaluateSettings
from training.recipes import FinetuneSettings
from ui.app import PageOptions

ROOT = Path(__file__).parents[1]
PACKAGES = ("training", "export", "serving", "ui", "benchmarks")
COMMANDS = {
    "training/pretrain.py": PretrainSettings,
    "training/evaluate.py": EvaluateSettings,
    "training/finetune.py": FinetuneSettings,
    "training/distil.py": DistilSettings,
    "training/ablate.py": AblateSettings,
    "export/to_onnx.py": ExportSettings,
    "export/quantize.py": QuantizeSettings,
    "serving/bulk.py": BulkSettings,
    "ui/app.py": PageOptions,
}


def folders() -> list[str]:
    """Every folder with source files, as `training/data`."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return sorted({file.parent.relative_to(ROOT).as_posix() for file in files})


@pytest.mark.parametrize("folder", folders())
def test_the_architecture_names_every_file_of_a_folder_and_no_other(folder):
    row = re.search(rf"^\| `{folder}/` \| (.*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    files = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
    assert set(re.findall(r"`(\w+\.\w+)`", row[1])) == files - {"RECORDS.md", "__init__.py", "py.typed"}


def test_the_walks_of_the_architecture_name_functions_that_are_there():
    steps = re.findall(r"^\| (`.+?) \| (`.+?) \| .+ \|$", walks(), re.MULTILINE)
    assert len(steps) > 20
    for files, functions in steps:
        texts = [
            next(path for place in ("", "*/") for path in ROOT.glob(place + file)).read_text()
            for file in re.findall(r"`([\w/]+\.py)`", files)
        ]
        for function in re.findall(r"`([\w.]+)`", functions):
            name = function.rpartition(".")[2]
            assert any(re.search(rf"\b(def|class) {name}\b|^{name} = ", text, re.MULTILINE) for text in texts), function


def walks() -> str:
    text = (ROOT / "docs" / "architecture.md").read_text()
    return text.partition("## Three walks")[2].partition("\n## ")[0]


def test_contributing_shows_lines_that_are_in_the_source():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:training|serving|ui|export|tests)/[\w/.]*)`", text)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for source in ("training/loss.py", "serving/protocol/filters.py"):
        example = re.search(rf"\({source}\).*?```\n(.*?)```", text, re.DOTALL)[1]
        assert example in re.sub(r"^ +", "", (ROOT / source).read_text(), flags=re.MULTILINE), source


@pytest.mark.slow
def test_every_module_begins_with_a_sentence_about_it():
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if file.name != "__init__.py"]
    assert len(files) > 100
    assert [str(file) for file in files if not ast.get_docstring(ast.parse(file.read_text()))] == []


def test_the_readme_names_commands_and_options_that_exist():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python (\S+\.py)(.*)", text) + re.findall(r"gpu (training/pretrain\.py)(.*)", text)
    commands += re.findall(r"rdzv-endpoint \S+ +(training/pretrain\.py)(.*)", text)
    assert {command for command, _ in commands} == set(COMMANDS)
    assert len(commands) > len(COMMANDS)
    for command, options in commands:
        known = {field.name.replace("_", "-") for field in dataclasses.fields(COMMANDS[command])}
        assert set(re.findall(r"--([\w-]+)", options.partition("#")[0])) <= known, command
    mentioned = set(re.findall(r"`--([\w-]+)`", text))
    assert mentioned <= {field.name.replace("_", "-") for field in dataclasses.fields(PretrainSettings)} | {"help"}
    assert set(re.findall(r"--preset (\w+)", text)) <= set(PRESETS)


def test_the_readme_shows_pictures_that_are_there():
    shown = re.findall(r"!\[[^\]]+\]\((\S+?)\)", (ROOT / "README.md").read_text())
    assert len(shown) >= 2
    assert all((ROOT / path).is_file() for path in shown)


@pytest.mark.parametrize("document", ["README.md", "docs/collections.md"])
def test_every_twinview_command_in_the_documents_can_be_given_as_it_stands(document):
    commands = re.findall(r"^twinview (.*)$", (ROOT / document).read_text(), re.MULTILINE)
    assert len(commands) > 3
    for line in commands:
        words = shlex.split(line, comments=True)
        name = next(name for name in main.COMMANDS if words[: name.count(" ") + 1] == name.split())
        main.parse_command(name, words[name.count(" ") + 1 :])  # ends the process where an option is not there
