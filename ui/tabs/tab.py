"""What the tabs have in common."""

import gradio as gr

from serving.client import AsyncClient


class Tab:
    """A tab of the page: `build` lays out its components, `connect` says which method runs at which event.

    client      the service
    trail       the searches so far, a Trail; all tabs show the last one and may add another
    collection  the name of the collection shown
    tabs, page  for the events of selecting a tab and of loading the page
    changed     how often the page has changed a collection; then tabs show it as it is now
    selected    the title of the tab that is shown; a tab does nothing while it is another's
    """

    title = ""

    def __init__(
        self,
        client: AsyncClient,
        trail: gr.State,
        collection: gr.Dropdown,
        tabs: gr.Tabs,
        page: gr.Blocks,
        changed: gr.State,
        selected: gr.State,
    ) -> None:
        self.client, self.trail, self.collection, self.tabs, self.page = client, trail, collection, tabs, page
        self.changed, self.selected = changed, selected
        self.build()
        self.connect()

    def build(self) -> None:
        raise NotImplementedError

    def connect(self) -> None:
        raise NotImplementedError


def to_similar() -> gr.Tabs:
    """Selects the tab Similar."""
    return gr.Tabs(selected="similar")
