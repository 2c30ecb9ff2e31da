"""The page's functions for programs: gradio_client calls them by name, and gets the same error messages as the page."""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

import gradio as gr

from serving.client import ServiceError
from serving.protocol.filters import FilterProblem
from ui.search.picture import UploadFailed

PROBLEMS = (ServiceError, UploadFailed, FilterProblem)  # their text is a sentence for the user
QUIET: dict[str, Any] = {
    "show_progress": "hidden",
    "api_visibility": "private",
}  # for events: no spinner, and programs cannot call them


def publish(function: Callable[..., Awaitable[Any]], name: str) -> None:
    """Let programs call the coroutine function `function`, whose arguments and result are JSON, under `name`."""

    @wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except PROBLEMS as error:
            raise gr.Error(str(error), print_exception=False) from error

    gr.api(call, api_name=name)
