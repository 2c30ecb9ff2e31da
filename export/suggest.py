"""What messages suggest: the nearest of the known names, and the next command."""

import difflib
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Such as "; did you mean lite0?"; empty if no name is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(given.lower(), names, n=1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def command(script: str, *arguments: str | Path) -> str:
    """A command line of this project that works from the current folder, such as `python export/to_onnx.py runs/NAME`.

    script  below the repository's root; written as an absolute path if the current folder is another
    """
    here = Path.cwd() == ROOT
    words = ["python", script if here else str(ROOT / script)]
    for argument in arguments:
        is_path = isinstance(argument, Path)
        words.append(
            os.path.relpath(argument) if is_path and Path(argument).is_relative_to(Path.cwd()) else str(argument)
        )
    return shlex.join(words)
