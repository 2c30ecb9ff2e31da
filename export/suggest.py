"""What messages suggest: the nearest of the known names, and the next command."""

import difflib
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IS_CHECKOUT = (ROOT / "pyproject.toml").exists()
"""Whether this code is a checkout, where programs are run as files, and not an installed package."""
SERVE = "bentoml serve" if IS_CHECKOUT else "twinview serve"
# Programs that are run as files in a checkout, and `twinview` with these words anywhere.
PROGRAMS = {
    "training/pretrain.py": "pretrain",
    "training/distil.py": "distil",
    "training/finetune.py": "finetune",
    "training/evaluate.py": "evaluate",
    "training/ablate.py": "ablate",
    "export/to_onnx.py": "export",
    "export/quantize.py": "quantize",
    "ui/app.py": "ui",
    "serving/bulk.py": "index add",
}


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Such as "; did you mean lite0?"; empty if no name is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(given.lower(), names, n=1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def program(script: str) -> str:
    """How one of PROGRAMS is run from the current folder: `python training/pretrain.py`, or `twinview pretrain`."""
    if not IS_CHECKOUT:
        return f"twinview {PROGRAMS[script]}"
    return shlex.join(["python", script if Path.cwd() == ROOT else str(ROOT / script)])


def installed_program(file: str) -> str | None:
    """How the program in this file was started where it is installed: `twinview pretrain`; None in a checkout."""
    name = PROGRAMS.get("/".join(Path(file).parts[-2:]))
    return None if IS_CHECKOUT or name is None else f"twinview {name}"


def command(script: str, *arguments: str | Path) -> str:
    """A whole command line, such as `python export/to_onnx.py runs/NAME`. Paths are written from the current folder."""
    words = []
    for argument in arguments:
        is_path = isinstance(argument, Path)
        words.append(
            os.path.relpath(argument) if is_path and Path(argument).is_relative_to(Path.cwd()) else str(argument)
        )
    return " ".join([program(script), *map(shlex.quote, words)])
