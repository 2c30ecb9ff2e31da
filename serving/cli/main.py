"""The command `twinview`: `twinview --help` lists what it does.

A command's module is loaded once it is asked for, so that help comes at once.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, get_type_hints

# words: module:function, what it does, and options that are given. Its one argument, `settings`, is a dataclass.
COMMANDS = {
    "embed": ("serving.cli.embed:embed", "Embed pictures by a service that runs: vectors and names into files."),
    "duplicates": ("serving.cli.duplicates:run", "List near-duplicates of a collection: which can stay for which."),
    "index add": ("serving.bulk:command", "Embed pictures and add them to a collection; --watch follows a folder."),
    "index remove": ("serving.cli.index:remove", "Take items out of a collection."),
    "index search": ("serving.cli.index:search", "Find the items most like a picture or another item."),
    "index list": ("serving.cli.index:list_", "Show which collections there are."),
    "index verify": ("serving.cli.index:verify", "Look for damage; the exit status is 1 where there is any."),
    "index undo": ("serving.cli.index:undo", "Show a collection's versions and go one step back."),
    "index export": ("serving.cli.transfer:export", "Write a collection into a Parquet file."),
    "index import": ("serving.cli.transfer:import_", "Add the rows of a Parquet file of `index export` or `embed`."),
    "index copy": ("serving.cli.transfer:copy", "Copy collections into another index: a folder or s3://bucket/prefix."),
    "index reembed": ("serving.bulk:command", "Embed a collection's pictures anew, by another encoder.", "--reembed"),
}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends a service ends it as Ctrl-C does
    words = sys.argv[1:]
    name = next((name for name in COMMANDS if words[: name.count(" ") + 1] == name.split()), None)
    try:
        if name is None:
            _explain(words)
        else:
            command, settings = parsed(name, words[name.count(" ") + 1 :])
            command(settings)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, _mistakes()):
            raise
        sys.exit(f"error: {error}")


def parsed(name: str, arguments: Sequence[str]) -> tuple[Callable[[Any], object], Any]:
    """What a command calls, and with what."""
    import tyro

    place, what, *given = COMMANDS[name]
    module, _, function = place.partition(":")
    command: Callable[[Any], object] = getattr(import_module(module), function)
    settings = get_type_hints(command)["settings"]
    config = (tyro.conf.FlagCreatePairsOff,)
    settings = tyro.cli(settings, prog=f"twinview {name}", description=what, args=[*given, *arguments], config=config)
    return command, settings


def _explain(words: Sequence[str]) -> None:
    """What there is that begins with these words."""
    words = [word for word in words if word not in ("-h", "--help")]
    chosen = [name for name in COMMANDS if name.split()[: len(words)] == words]
    if not chosen:
        named = " ".join(words[:2])
        print(f"error: there is no command twinview {named}; `twinview --help` lists them", file=sys.stderr)
        sys.exit(2)
    print(f"usage: {' '.join(['twinview', *words])} COMMAND ...     (COMMAND --help tells its options)\n")
    for name in chosen:
        print(f"  {name:15} {COMMANDS[name][1]}")


def _mistakes() -> tuple[type[Exception], ...]:
    """What is the user's to put right, and told in a sentence."""
    from export.artifact import BundleError
    from serving.client import ServiceError
    from serving.collection.exchange import FileProblem
    from serving.collection.store import StoreProblem
    from serving.protocol.filters import FilterProblem
    from training.data.sources import DataError

    return BundleError, ServiceError, FileProblem, FilterProblem, StoreProblem, DataError, OSError
