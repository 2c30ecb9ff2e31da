"""How far a computation over the whole collection is, in words, and the button that starts it: map and duplicates."""

from html import escape

import gradio as gr

from serving.client import Overview
from ui.search.picture import notice

POLL_S = 1.0
CSS = """
.computing { align-items: center; flex-wrap: wrap; gap: 8px 20px; }
.computing > .block { flex: 1 1 300px; }
.computing > button { flex: 0 0 auto; min-width: 130px !important; }
.told { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; margin: 0; }
.told { color: var(--body-text-color-subdued); }
.told progress { width: 160px; height: 6px; accent-color: var(--primary-600); }
.link { padding: 0; border: 0; background: none; color: var(--primary-700); cursor: pointer; }
.link:hover, .link:focus-visible { text-decoration: underline; }
.dark .link { color: var(--primary-400); }
"""


def told(overview: Overview, what: str, none: str, explanation: str) -> str:
    """In HTML. what: "The map"; none: what is said where there is none yet."""
    if overview.state == "computing":
        share = f'<progress value="{overview.share:.3f}" aria-label="{escape(overview.stage)}"></progress>'
        return f'<p class="told" role="status">{share}{escape(overview.stage.capitalize())}, {overview.share:.0%}</p>'
    if overview.state == "failed":
        return notice(f"{what} could not be made: {overview.problem}.")
    if overview.count is None:
        return notice(none)
    return f'<p class="told">{extent(overview)}. {escape(explanation)}</p>'


def extent(overview: Overview) -> str:
    """Of how many pictures it is, and what has changed since."""
    pictures = "1 picture" if overview.count == 1 else f"{overview.count:,} pictures"
    changes = [f"{n:,} {word}" for n, word in ((overview.new, "new"), (overview.gone, "gone")) if n]
    return f"{pictures}; {' and '.join(changes)} since it was made" if changes else pictures


def button(overview: Overview, first: str, again: str) -> dict:
    """An update of the button that starts it. first: where there is none yet; again: where there is one."""
    stale = bool(overview.new or overview.gone)
    label = first if overview.count is None else again
    variant = "primary" if overview.count is None or stale else "secondary"
    return gr.update(visible=True, value=label, interactive=overview.state != "computing", variant=variant)


def ticking(overview: Overview) -> gr.Timer:
    """The timer that asks again, while there is something to wait for."""
    return gr.Timer(POLL_S, active=overview.state == "computing")
