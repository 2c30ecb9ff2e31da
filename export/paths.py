"""Paths as users write them, on a command line or in a variable: the one place that reads them.

~ is the home folder, also where no shell has replaced it: in --index=~/index, in .env files, compose files and systemd
units. A relative path starts at the current folder.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args

from export.suggest import installed_program
from export.terminal import prepare_output

S = TypeVar("S")


def local_path(given: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(given)))


def at_home(given: str) -> str:
    """Replaces ~ at the beginning of a text that may be a path, or the name of something else."""
    return os.path.expanduser(given)


def valid_text(name: str) -> str:
    """Replaces the bytes of a file name that are not UTF-8: a table cannot store them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def parse_settings(kind: type[S], arguments: Sequence[str] | None = None, **options: Any) -> S:
    """The settings of a command line, a dataclass. options: of tyro.cli, such as prog, the name in its help"""
    import tyro  # takes a quarter of a second

    prepare_output()
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_optional)
    options.setdefault("prog", installed_program(sys.argv[0]))
    return with_local_paths(tyro.cli(kind, args=arguments, registry=registry, **options))


def _optional(info: Any) -> Any:
    """tyro's rule for a setting that may be None: its help names the other type alone, and None is typed as none."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if info.type_origin not in (Union, UnionType) or len(kinds) != 1 or len(get_args(info.type)) != 2:
        return None  # another rule's
    inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(inner, PrimitiveConstructorSpec):
        return inner  # why the other type cannot be read

    def read(words: list[str]) -> Any:
        return None if words[0].lower() == "none" else inner.instance_from_str(words)

    return PrimitiveConstructorSpec(
        nargs=inner.nargs,
        metavar=inner.metavar,
        choices=inner.choices and (*inner.choices, "none"),
        instance_from_str=read,
        is_instance=lambda value: value is None or inner.is_instance(value),
        str_from_instance=lambda value: ["none"] if value is None else inner.str_from_instance(value),
    )


def with_local_paths(settings: S) -> S:
    """Settings with every Path absolute, and ~ replaced at the beginning of every text: many of them may be paths."""
    fields = dataclasses.fields(settings)  # pyrefly: ignore[bad-argument-type]
    given = {field.name: getattr(settings, field.name) for field in fields if field.init}
    changed = {name: _local(value) for name, value in given.items()}
    return dataclasses.replace(settings, **changed)  # pyrefly: ignore[bad-specialization]


def _local(value: Any) -> Any:
    if isinstance(value, Path):
        return local_path(value)
    if isinstance(value, str):
        return at_home(value)
    if isinstance(value, tuple):
        return tuple(_local(one) for one in value)
    return value
