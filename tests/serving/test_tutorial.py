"""The commands and programs of the tutorial, one after the other, on few pictures and without lite0."""

import csv
import re
import shlex
import shutil
from pathlib import Path

import pytest

from export.paths import parse_settings
from export.to_onnx import ExportSettings
from serving.collection.index import existing_collections

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
SMALL = {"--minutes 3": "--epochs 1 --size-px 16 --batch-size 16", "--limit 300": "--limit 20"}
COUNT = 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_the_tutorial_can_be_followed_to_its_end(tmp_path, monkeypatch, capsys, bundle, picture, twinview, listen):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("Pictures").mkdir()
    for seed in range(COUNT):
        Path(f"Pictures/{seed}.png").write_bytes(picture(seed))
    done, names, port = [], {}, 0
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", TUTORIAL.read_text(), re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(block.replace("3000", str(port)), names)
            done.append("program")
            continue
        for given, small in SMALL.items():
            block = block.replace(given, small)
        for line in block.splitlines():
            program, *words = shlex.split(line.replace("~", str(tmp_path)), comments=True)
            assert program == "twinview"
            if words == ["export", "lite0"]:  # which takes half a minute
                parse_settings(ExportSettings, words[1:])
                shutil.copytree(bundle.folder, "runs/lite0/encoder")
            elif words == ["serve"]:
                port, _ = listen()
            else:
                twinview(*words)
            done.append(" ".join(words[:2]) if words[0] == "index" else words[0])
    names["client"].close()
    assert done == [
        *("export", "index add", "index list", "serve", "program", "duplicates", "pick", "program"),
        *("pretrain", "export", "evaluate", "index reembed"),
    ]
    printed = capsys.readouterr().out
    assert f"indexed {COUNT}, already there 0, skipped 0" in printed
    assert len(re.findall(r"^-?\d\.\d\d  \d+\.png$", printed, re.MULTILINE)) == 5
    assert len(re.findall(r"^(?:keep|other), \d+% of the votes", printed, re.MULTILINE)) == 5
    with open("to_label.csv") as file:
        assert len([*csv.DictReader(file)]) == 10
    assert "groups.csv" in printed and Path("runs/mine/report.png").exists()
    assert "lite0-encoder" in printed and "mine-encoder" in printed
    encoders = {table.encoder for table in existing_collections("index", "pictures")}
    assert len(encoders) == 2 and bundle.card.id in encoders
