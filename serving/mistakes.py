"""What is wrong with a field of a request, in a sentence: `searches[2].k: "5" is text, a whole number is needed`.

Pydantic's own messages speak of Python's types and of our classes. Every kind of its errors that the requests' models
can cause has its words here.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from export.suggest import did_you_mean
from serving.protocol.queries import PATTERNS
from serving.protocol.shown import MOST, kind_shown, shown

NEEDED = {  # what a field of this kind must have
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "json_type": "text with JSON",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "text",
    "string_unicode": "valid text",
}
BOUNDS = {  # (words, name of the bound)
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
WORDS: dict[str, Callable[[Any, Mapping[str, Any]], str]] = {  # by the kind of error, from the value and the details
    "missing": lambda value, details: "is missing",
    "bool_parsing": lambda value, details: f"{shown(value)} is neither true nor false",
    "float_parsing": lambda value, details: f"{shown(value)} is not a number",
    "int_parsing": lambda value, details: f"{shown(value)} is not a whole number",
    "int_parsing_size": lambda value, details: f"{shown(value)} is too large",
    "literal_error": lambda value, details: (
        f"{shown(value)} is given, {details['expected'].replace(chr(39), '')} is needed"
    ),
    "string_pattern_mismatch": lambda value, details: f"{shown(value)} is not {PATTERNS[details['pattern']]}",
    "string_too_long": lambda value, details: (
        f"has {len(value):,} characters, at most {details['max_length']:,} are allowed"
    ),
    "too_long": lambda value, details: f"has more than {details['max_length']:,} elements",
    "too_short": lambda value, details: "is empty",
    "value_error": lambda value, details: "must be a file",  # of FastAPI, which names its classes
}
KEY = "[key]"  # pydantic's mark for an error in a key
NAME = re.compile(r"[^\W\d]\w{0,63}")


def foremost(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the first of pydantic's errors; or if that is a missing field, the misspelt one that is meant."""
    first = errors[0]
    if first["type"] == "missing":
        for error in errors:
            beside = error["loc"][:-1] == first["loc"][:-1] and error["type"] == "extra_forbidden"
            if beside and did_you_mean(str(error["loc"][-1]), [str(first["loc"][-1])]):
                return error
    return first


def mistake(error: Mapping[str, Any], kind: type[BaseModel] | None = None, skip: int = 0) -> tuple[str, str | None]:
    """Returns the sentence about one of pydantic's errors, and the field that it names; None for the whole body.

    kind  the model that was validated; for suggestions
    skip  leading parts of the error's location that are not in the client's input
    """
    location = [part for part in error["loc"][skip:] if not str(part).startswith("~")]  # without the tags of unions
    if len(location) > 1 and location[-1] == KEY:
        location = location[:-2]  # the message shows the key
    field = written(location)
    message = _message(error, kind, location)
    return (f"{field}: {message}" if field else f"the body: {message}"), field


def written(location: list[str | int]) -> str | None:
    """Returns a location as the client wrote it, such as `items[3].metadata["unit price"]`; None if it is empty."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif NAME.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f"[{shown(part)}]" if text else shown(part)
    return text or None


def no_json(reason: str, line: int, column: int) -> str:
    """Returns the words for text that is not JSON. The parser's reason only tells whether the text ends too early."""
    if re.match("EOF|unexpected end of data", reason):
        return "is not valid JSON: it ends too early" if column else "is empty; JSON is needed"
    return f"is not valid JSON from line {line}, column {column} on"


def _message(error: Mapping[str, Any], kind: type[BaseModel] | None, location: list[str | int]) -> str:
    type, value, details = error["type"], error.get("input"), error.get("ctx", {})
    if type == "json_invalid":
        reason = str(details["error"])  # such as "expected value at line 1 column 3"
        line, column = map(int, re.findall(r"\d+", reason)[-2:])
        return no_json(reason, line, column)
    if type == "extra_forbidden":
        known = _fields(kind, location[:-1])
        return "is not a field" + (did_you_mean(str(location[-1]), known) or f" here; known are {', '.join(known)}")
    if type in BOUNDS:
        words, bound = BOUNDS[type]
        given = value[:MOST] if isinstance(value, str) else shown(value)  # the text of a query or form
        return f"{given} is given, {words} {f'{details[bound]:,}'.removesuffix('.0')} is needed"
    if type in WORDS:
        return WORDS[type](value, details)
    needed = error["msg"] if type == "needed" else NEEDED.get(type)
    return f"{kind_shown(value)}, {needed} is needed" if needed else f"{shown(value)} is not allowed"


def _fields(kind: type[BaseModel] | None, location: list[str | int]) -> list[str]:
    """Returns the names of the fields at a location inside a model."""
    for part in location:
        if kind and part in kind.model_fields:
            kind = next(_models(kind.model_fields[str(part)].annotation), None)
    return list(kind.model_fields) if kind else []


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
