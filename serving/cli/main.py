"""The command `twinview`: `twinview --help` lists its commands.

Each command's module is imported only when it is used, so that help is printed at once.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, get_type_hints

# command: module:function, help, options that are always set. The function's only argument is a dataclass, `settings`.
COMMANDS = {
    "embed": ("serving.cli.embed:embed", "Embed pictures with a running service; write vectors and names to files."),
    "duplicates": ("serving.cli.duplicates:run", "List the near-duplicates of a collection in a CSV file."),
    "index add": ("serving.bulk:command", "Embed pictures and add them to a collection; --watch follows a folder."),
    "index remove": ("serving.cli.index:remove", "Remove items from a collection."),
    "index search": ("serving.cli.index:search", "Find the items most similar to a picture or another item."),
    "index list": ("serving.cli.index:list_", "List the collections."),
    "index verify": ("serving.cli.index:verify", "Look for damage; the exit status is 1 if there is any."),
    "index undo": ("serving.cli.index:undo", "Show a collection's versions and undo the last change."),
    "index export": ("serving.cli.index:export", "Write a collection to a Parquet file."),
    "index import": ("serving.cli.index:import_", "Add the rows of a Parquet file of `index export` or `embed`."),
    "index copy": ("serving.cli.index:copy", "Copy collections to another index: a folder or s3://bucket/prefix."),
    "index reembed": ("serving.bulk:command", "Embed a collection's pictures again with another encoder.", "--reembed"),
}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends a command like Ctrl-C
    words = sys.argv[1:]
    name = next((name for name in COMMANDS if words[: name.count(" ") + 1] == name.split()), None)
    try:
        if name is None:
            _explain(words)
        else:
            command, settings = parse_command(name, words[name.count(" ") + 1 :])
            command(settings)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        sys.exit(f"error: {error}")


def parse_command(name: str, arguments: Sequence[str]) -> tuple[Callable[[Any], object], Any]:
    """The function of a command, and its settings."""
    import tyro

    function_path, description, *fixed = COMMANDS[name]
    module, _, function = function_path.partition(":")
    command: Callable[[Any], object] = getattr(import_module(module), function)
    settings = tyro.cli(
        get_type_hints(command)["settings"],
        prog=f"twinview {name}",
        description=description,
        args=[*fixed, *arguments],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return command, settings


def _explain(words: Sequence[str]) -> None:
    """Print the commands that start with these words."""
    words = [word for word in words if word not in ("-h", "--help")]
    names = [name for name in COMMANDS if name.split()[: len(words)] == words]
    if not names:
        command = " ".join(words[:2])
        print(f"error: there is no command twinview {command}; `twinview --help` lists all", file=sys.stderr)
        sys.exit(2)
    print(f"usage: {' '.join(['twinview', *words])} COMMAND ...     (COMMAND --help explains its options)\n")
    for name in names:
        print(f"  {name:15} {COMMANDS[name][1]}")


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors that the user can correct: the message is printed, without a traceback."""
    from export.artifact import BundleError
    from serving.client import ServiceError
    from serving.collection.exchange import FileProblem
    from serving.collection.problems import IndexProblem
    from serving.protocol.filters import FilterProblem
    from training.data.sources import DataError

    return BundleError, ServiceError, FileProblem, FilterProblem, IndexProblem, DataError, OSError
