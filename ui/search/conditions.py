"""Conditions on the page: the choices it offers, and a hint how to type others."""

from collections.abc import Sequence

from serving.client import Key
from serving.protocol.filters import typed_equality

FEW = 12  # most values offered for a key


def condition_choices(keys: Sequence[Key]) -> list[tuple[str, str]]:
    """Returns the choices (shown, typed): a key's commonest values, or below and above its median number."""
    choices = []
    for key in keys:
        if key.type in ("number", "whole") and key.distinct > FEW:
            choices += [(f"{key.key}{sign}{key.median:g}",) * 2 for sign in ("<", ">=")]
            continue
        for value, count in key.values[:FEW]:
            typed = typed_equality(key.key, value)
            choices.append((f"{typed} ({count:,})", typed))
    return choices


def condition_hint(keys: Sequence[Key]) -> str:
    """Returns how to type conditions, with this collection's keys and ranges of numbers."""
    ranges = [f"{key.key} ({key.least:g} to {key.most:g})" for key in keys if key.least is not None]
    names = [key.key for key in keys if key.least is None] + ranges
    keys_typed = ", ".join(names) or "label"
    return f"Type a part of a name, or a condition like label=shirt or price>=3, and press Enter. Keys: {keys_typed}."
