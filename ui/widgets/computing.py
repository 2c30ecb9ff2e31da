"""Progress of a computation over the whole collection (map, near-duplicates), and the button that starts it."""

from html import escape
from typing import Any

import gradio as gr

from serving.client import DerivedResult, ServiceError
from serving.protocol.shown import counted
from ui.search.picture import notice

POLL_S = 1.0
WAIT_S = 5.0  # between polls until a computation begins by itself


def status_html(result: DerivedResult, what: str, none: str, explanation: str) -> str:
    """The progress, the failure, or how many pictures the result covers.

    what         names the result: "The map"
    none         shown if there is no result yet
    explanation  shown with a result
    """
    if result.state == "computing":
        bar = f'<progress value="{result.share:.3f}" aria-label="{escape(result.stage)}"></progress>'
        return f'<p class="status" role="status">{bar}{escape(result.stage.capitalize())}, {result.share:.0%}</p>'
    if result.state == "failed":
        return notice(f"{what} could not be made: {result.problem}.")
    if result.count is None:
        waiting = f'<p class="status" role="status"><progress></progress>{escape(what)} is being made</p>'
        return waiting if result.automatic else notice(none)
    changes = [f"{n:,} {word}" for n, word in ((result.new, "new"), (result.gone, "deleted")) if n]
    since = f"; {' and '.join(changes)} since it was made" if changes else ""
    since += ". It will be made again by itself" if changes and result.automatic else ""
    return f'<p class="status">{counted(result.count)}{since}. {escape(explanation)}{without(result.missing)}</p>'


def without(missing: int) -> str:
    """A sentence about pictures that are not in what is shown, because they are still to be embedded again."""
    be = "is" if missing == 1 else "are"
    return f" {counted(missing)} {be} still to be embedded again, and not among them." if missing else ""


def start_button(result: DerivedResult, first: str, again: str) -> dict[str, Any]:
    """An update of the button that starts the computation, unless that starts by itself. first, again: its label
    without and with a result."""
    return gr.update(
        visible=not result.automatic or result.state == "failed",
        value=first if result.count is None else again,
        interactive=result.state != "computing",
        variant="primary" if _is_outdated(result) else "secondary",
    )


def timer(result: DerivedResult) -> gr.Timer:
    """A timer that triggers while the computation is running, to update the progress, or until it starts by itself."""
    if result.state == "computing":
        return gr.Timer(POLL_S, active=True)  # an update sets only what is named
    return gr.Timer(WAIT_S, active=result.automatic and result.state != "failed" and _is_outdated(result))


def retry(error: ServiceError) -> gr.Timer:
    """A timer that asks again after an error that may pass."""
    return gr.Timer(WAIT_S, active=error.status in (0, 429) or error.status >= 500)


def _is_outdated(result: DerivedResult) -> bool:
    return result.count is None or bool(result.new or result.gone)
