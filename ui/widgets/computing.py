"""Progress of a computation over the whole collection (map, near-duplicates), and the button that starts it."""

from html import escape
from typing import Any

import gradio as gr

from serving.client import DerivedResult
from ui.search.picture import counted, notice

POLL_S = 1.0


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
        return notice(none)
    changes = [f"{n:,} {word}" for n, word in ((result.new, "new"), (result.gone, "deleted")) if n]
    since = f"; {' and '.join(changes)} since it was made" if changes else ""
    return f'<p class="status">{counted(result.count)}{since}. {escape(explanation)}</p>'


def start_button(result: DerivedResult, first: str, again: str) -> dict[str, Any]:
    """An update of the button that starts the computation. first, again: its label without and with a result."""
    outdated = result.count is None or bool(result.new or result.gone)
    return gr.update(
        visible=True,
        value=first if result.count is None else again,
        interactive=result.state != "computing",
        variant="primary" if outdated else "secondary",
    )


def timer(result: DerivedResult) -> gr.Timer:
    """A timer that triggers while the computation is running, to update the progress."""
    return gr.Timer(POLL_S, active=result.state == "computing")
