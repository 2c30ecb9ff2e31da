"""The page's functions for programs: gradio_client calls them by name, and gets the same error messages as the page."""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

import gradio as gr

from serving.client import ServiceError
from serving.protocol.filters import FilterProblem
from ui.search.picture import UploadFailed

PROBLEMS = (ServiceError, UploadFailed, FilterProblem)  # their text is a sentence for the user
# Settings of events. By default Gradio drops an event while an earlier one of its kind is handled.
# With "always_last" it handles the last of those again when it is done, with the inputs of that moment but the event
# data of the first: only for handlers that take no event data.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "trigger_mode": "always_last"}  # programs cannot call them
QUIET: dict[str, Any] = PRIVATE | {"show_progress": "hidden"}  # no spinner
EACH: dict[str, Any] = QUIET | {"trigger_mode": "multiple", "concurrency_limit": 1}  # every event, one after another
ON_TRAIL: dict[str, Any] = EACH | {"concurrency_id": "trail"}  # also after each other's, as they change one state


def publish(function: Callable[..., Awaitable[Any]], name: str) -> None:
    """Let programs call the coroutine function `function`, whose arguments and result are JSON, under `name`."""

    @wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except PROBLEMS as error:
            raise gr.Error(str(error), print_exception=False) from error

    gr.api(call, api_name=name)
