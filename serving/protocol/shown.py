"""Values and counts in sentences."""

import json

MOST = 80
"""Characters of a value in a message."""


def shown(value: object) -> str:
    """Returns the value as JSON, cut off when it is long: "blue", 3.5, true, null, [1, 2]."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return "a value that is no JSON"
    text = text.encode(errors="backslashreplace").decode()  # halves of a surrogate pair
    return text if len(text) <= MOST else text[: MOST - 3] + "..."


def kind_shown(value: object) -> str:
    """Returns what was given instead of what is needed: `"5" is text`, `true is given`, `a list is given`."""
    if isinstance(value, str):
        return f"{shown(value)} is text"
    if isinstance(value, (list, tuple)):
        return "a list is given"
    return "an object is given" if isinstance(value, dict) else f"{shown(value)} is given"


def counted(count: int, what: str = "picture") -> str:
    """Such as "1 picture", "2,000 pictures" or "2 copies"."""
    if count != 1:
        what = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{count:,} {what}"
