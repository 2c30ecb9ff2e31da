"""What the page does, for programs: gradio_client calls it by name, and what goes wrong is told in the same words."""

from collections.abc import Callable
from functools import wraps

import gradio as gr

from serving.client import ServiceError
from ui.search.conditions import ConditionProblem
from ui.search.picture import UploadFailed

PROBLEMS = (ServiceError, UploadFailed, ConditionProblem)  # whose text is a sentence for the user


def publish(function: Callable, name: str) -> None:
    """Offer the coroutine `function`, of plain inputs and outputs, under `name`."""

    @wraps(function)
    async def called(*args, **kwargs):
        try:
            return await function(*args, **kwargs)
        except PROBLEMS as error:
            raise gr.Error(str(error), print_exception=False) from error

    gr.api(called, api_name=name)
