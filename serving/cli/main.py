"""The command `twinview`: `twinview --help` lists its commands.

Each command's module is imported only when it is used, so that help is printed at once. The programs are those that a
checkout runs as files: `twinview pretrain` is `python training/pretrain.py`.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, get_type_hints

from export.suggest import PROGRAMS, did_you_mean
from export.terminal import prepare_output

# command: module:function, help, options that are always set. The function's only argument is a dataclass, `settings`.
COMMANDS = {
    "embed": ("serving.cli.embed:embed", "Embed pictures with a running service; write vectors and names to files."),
    "duplicates": ("serving.cli.duplicates:run", "List the near-duplicates of a collection in a CSV file."),
    "pick": ("serving.cli.pick:run", "List the pictures of a collection that should be labelled first."),
    "odd": ("serving.cli.odd:run", "List outliers, doubtful labels or broken pictures of a collection."),
    "split": ("serving.cli.split:run", "Divide a collection into train, validation and test; list them in a CSV file."),
    "coverage": ("serving.cli.coverage:run", "List the pictures of a collection that another one does not cover."),
    "index add": ("serving.bulk:command", "Embed pictures and add them to a collection; --watch follows a folder."),
    "index remove": ("serving.cli.index:remove", "Remove items from a collection."),
    "index search": ("serving.cli.index:search", "Find the items most similar to a picture or another item."),
    "index drop": ("serving.cli.index:drop", "Delete a collection, for good."),
    "index rename": ("serving.cli.index:rename", "Give a collection another name."),
    "index alias": ("serving.cli.index:alias", "Let another name stand for a collection, or switch it."),
    "index list": ("serving.cli.index:list_", "List the collections."),
    "index verify": ("serving.cli.index:verify", "Look for damage; the exit status is 1 if there is any."),
    "index history": ("serving.cli.index:history", "List what was changed in a collection, and when."),
    "index undo": ("serving.cli.index:undo", "Undo the newest change of a collection, or another one."),
    "index export": ("serving.cli.index:export", "Write a collection to a Parquet file."),
    "index import": ("serving.cli.index:import_", "Add the rows of a Parquet file of `index export` or `embed`."),
    "index copy": ("serving.cli.index:copy", "Copy collections to another index: a folder or s3://bucket/prefix."),
    "index reembed": ("serving.bulk:command", "Embed a collection's pictures again with another encoder.", "--reembed"),
}
SERVE = (sys.executable, "-m", "bentoml", "serve", "serving.service:Twinview")
PROGRAM_HELP = {
    "serve": "Serve encoders, collections and the page; takes the options of `bentoml serve`.",
    "pretrain": "Pretrain an encoder on unlabelled images, or adapt one.",
    "distil": "Train a small encoder to give the neighbours that a larger one gives.",
    "finetune": "Train a classifier on few labels.",
    "evaluate": "Measure how good an encoder's vectors are on your images.",
    "ablate": "Repeat a published experiment on your images.",
    "export": "Write a trained or foreign encoder as ONNX, to be served.",
    "quantize": "Make a smaller and faster encoder of an exported one.",
    "ui": "Serve only the page, for a service that runs elsewhere.",
}
FILES = {name: file for file, name in PROGRAMS.items()}


def main() -> None:
    prepare_output()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends a command like Ctrl-C
    words = sys.argv[1:]
    if words == ["--version"]:
        return print(f"twinview {version('twinview')}")
    if words and words[0] in PROGRAM_HELP:
        return _run_program(words[0], words[1:])
    name = next((name for name in COMMANDS if words[: name.count(" ") + 1] == name.split()), None)
    try:
        if name is None:
            _explain(words)
        else:
            command, settings = parse_command(name, words[name.count(" ") + 1 :])
            _refuse_misspelt_settings()
            command(settings)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        sys.exit(f"error: {error}")


def _run_program(name: str, arguments: Sequence[str]) -> None:
    if name == "serve":
        os.execv(SERVE[0], [*SERVE, *arguments])
    module_name = FILES[name].removesuffix(".py").replace("/", ".")
    try:
        module: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("export", "serving", "training", "ui"):
            raise
        extra = "page" if name == "ui" else "train"
        sys.exit(f"error: twinview {name} needs the package {package}: pip install 'twinview[{extra}]'")
    sys.argv = [module.__file__, *arguments]  # of training on several devices, each process starts this file
    module.main()


def parse_command(name: str, arguments: Sequence[str]) -> tuple[Callable[[Any], object], Any]:
    """The function of a command, and its settings."""
    import tyro

    from export.paths import parse_settings

    function_path, description, *fixed = COMMANDS[name]
    module, _, function = function_path.partition(":")
    command: Callable[[Any], object] = getattr(import_module(module), function)
    settings = parse_settings(
        get_type_hints(command)["settings"],
        [*fixed, *arguments],
        prog=f"twinview {name}",
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return command, settings


def _explain(words: Sequence[str]) -> None:
    """Print the commands that start with these words."""
    words = [word for word in words if word not in ("-h", "--help")]
    descriptions = PROGRAM_HELP | {name: description for name, (_, description, *_) in COMMANDS.items()}
    names = [name for name in descriptions if name.split()[: len(words)] == words]
    if not names:
        command = " ".join(words[:2])
        inside = [name.split()[1] for name in COMMANDS if name.split()[:1] == words[:1] and " " in name]
        near = (
            did_you_mean(words[1], inside)
            if inside
            else did_you_mean(words[0], {name.split()[0] for name in descriptions})
        )
        print(
            f"error: there is no command twinview {command}{near or ';'} `twinview --help` lists all", file=sys.stderr
        )
        sys.exit(2)
    print(f"usage: {' '.join(['twinview', *words])} COMMAND ...     (COMMAND --help explains its options)\n")
    for name in names:
        print(f"  {name:15} {descriptions[name]}")


def _refuse_misspelt_settings() -> None:
    from serving.limits import refuse_misspelt

    refuse_misspelt()


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors that the user can correct: the message is printed, without a traceback."""
    from export.artifact import BundleError
    from serving.client import ServiceError
    from serving.collection.exchange import FileProblem
    from serving.collection.problems import IndexProblem
    from serving.limits import SettingProblem
    from serving.protocol.filters import FilterProblem
    from training.data.sources import DataError

    return BundleError, ServiceError, FileProblem, FilterProblem, IndexProblem, SettingProblem, DataError, OSError
