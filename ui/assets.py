"""The page's style sheets and scripts: .css and .js files next to the Python that uses them.

A script runs as the body of a function of gr.HTML, with `element`, `trigger`, `props`, `server`, `upload` and `watch`
in scope; biome.json declares these names.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr

FOLDER = Path(__file__).parent
STYLE_ORDER = ("", "search", "widgets", "tabs")  # folders; on a tie in CSS the later rule wins


def style_sheet() -> str:
    """All style sheets of the page in one."""
    files = [file for folder in STYLE_ORDER for file in sorted((FOLDER / folder).glob("*.css"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def script(name: str) -> str:
    """The text of ui/NAME.js."""
    return (FOLDER / f"{name}.js").read_text(encoding="utf-8")


ServerFunction: TypeAlias = Callable[[Any], Awaitable[Any]]


def raw_html(
    value: str | None = "", scripts: Sequence[str] = (), functions: Sequence[ServerFunction] = (), **more: Any
) -> gr.HTML:
    """An HTML component without Gradio's own styles.

    scripts    names of the .js files that run in it, in this order
    functions  coroutine functions of one argument, which the scripts call as server.NAME(argument)
    """
    code = "\n".join(map(script, scripts)) or None
    server = [_function(function) for function in functions]
    return gr.HTML(value, js_on_load=code, apply_default_css=False, server_functions=server, **more)


def _function(method: ServerFunction) -> ServerFunction:
    """A plain function: Gradio sets an attribute on it, which a bound method does not allow."""

    @wraps(method)
    async def call(argument: Any) -> Any:
        return await method(argument)

    return call
