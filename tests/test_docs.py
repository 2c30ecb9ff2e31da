"""The documents speak of what there is."""

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
ROOMS = ("training", "export", "serving", "ui", "benchmarks")
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


@pytest.mark.parametrize("room", ROOMS)
def test_the_architecture_names_every_file_of_a_room_and_no_other(room):
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = re.search(rf"\| \*\*{room}/\*\* \|.*?(?=\| \*\*|\n\n)", text, re.DOTALL).group()
    named = {name for row in section.splitlines() for name in re.findall(r"`(\w+\.\w+)`", row.split("|")[1])}
    there = {path.name for path in (ROOT / room).iterdir() if path.is_file() and path.name != "__init__.py"}
    assert named == there - {"RECORDS.md"}


def test_the_readme_names_commands_and_options_that_exist():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    told = re.findall(r"python (\S+\.py)(.*)", text) + re.findall(r"gpu (training/pretrain\.py)(.*)", text)
    told += re.findall(r"rdzv-endpoint \S+ +(training/pretrain\.py)(.*)", text)
    assert {command for command, _ in told} == set(COMMANDS)
    assert len(told) > len(COMMANDS)
    for command, options in told:
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
    told = re.findall(r"^twinview (.*)$", (ROOT / document).read_text(), re.MULTILINE)
    assert len(told) > 3
    for line in told:
        words = shlex.split(line, comments=True)
        name = next(name for name in main.COMMANDS if words[: name.count(" ") + 1] == name.split())
        main.parse_command(name, words[name.count(" ") + 1 :])  # ends the process where an option is not there
