"""Which pictures of a collection are meant, as it is typed: `label=shirt`, `price>=3`. All conditions must hold."""

import json
import re
from collections.abc import Sequence

from serving.client import Key
from serving.protocol import where
from serving.protocol.filters import FilterProblem

CONDITION = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=|!=|=|>|<)\s*(.*\S)\s*")
VALUE = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^,]+)')
PLAIN = re.compile(r'[^\s,"]+')
FEW = 12  # values of a key that are offered


class ConditionProblem(ValueError):
    """A condition that cannot be meant. The message is a sentence for the user."""


def parsed(conditions: Sequence[str]) -> dict | None:
    """The service's filter; None without conditions. Several values that a key may equal are alternatives, wherever
    they stand. raises ConditionProblem, which names the condition"""
    found: dict[str, dict] = {}
    for typed in conditions:
        for key, operator, value in _read(typed):
            wanted = found.setdefault(key, {})
            if operator in ("eq", "in"):
                more = value if operator == "in" else (value,)
                wanted["in"] = [*wanted.get("in", []), *more]
            elif wanted.setdefault(operator, value) != value:
                raise ConditionProblem(f"{typed} stands beside another bound of the same kind; remove one of them.")
    return found or None


def _read(typed: str) -> tuple:
    """As a shell takes them (serving/protocol/where.py), but for blanks, which need no quotes here."""
    if shape := CONDITION.fullmatch(typed):
        key, sign, rest = shape.groups()
        values = [one if one[0] == '"' else quoted(one) for one in map(str.strip, VALUE.findall(rest)) if one]
        try:
            return where.parse(f"{key}{sign}{','.join(values)}").conditions
        except FilterProblem:
            pass
    raise ConditionProblem(f"{typed} is no condition such as label=shirt, price>=3 or colour=red,blue.")


def quoted(value: str) -> str:
    return value if PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def offered(keys: Sequence[Key]) -> list[tuple[str, str]]:
    """What there is to choose: (as it is shown, as it is typed), of each key its commonest values, or its middle."""
    found = []
    for key in keys:
        if key.type in ("number", "whole") and key.distinct > FEW:
            found += [(f"{key.key}{sign}{key.median:g}", f"{key.key}{sign}{key.median:g}") for sign in ("<", ">=")]
            continue
        for value, count in key.values[:FEW]:
            text = quoted(value) if isinstance(value, str) else json.dumps(value)
            if isinstance(value, str) and key.key not in where.TEXTS and _means_else(value):
                text = json.dumps(value)
            found.append((f"{key.key}={text} ({count:,})", f"{key.key}={text}"))
    return found


def _means_else(text: str) -> bool:
    """Whether a text would be read as a number, true, false or null."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def hint(keys: Sequence[Key]) -> str:
    """How conditions are typed, by the example of this collection."""
    ranges = [f"{key.key} ({key.least:g} to {key.most:g})" for key in keys if key.least is not None]
    names = [key.key for key in keys if key.least is None] + ranges
    return f"Choose, or type such as label=shirt or price>=3, then Enter. Here: {', '.join(names) or 'label'}."
