"""What the tabs have in common."""

import gradio as gr

from serving.client import AsyncClient


class Tab:
    """A tab of the page: `build` lays out its components, `connect` says which method runs at which event.

    client      the service
    trail       the searches so far, a Trail; all tabs show the last one and may add another
    collection  the name of the collection shown
    tabs, page  for the events of selecting a tab and of loading the page
    """

    title = ""

    def __init__(
        self, client: AsyncClient, trail: gr.State, collection: gr.Dropdown, tabs: gr.Tabs, page: gr.Blocks
    ) -> None:
        self.client, self.trail, self.collection, self.tabs, self.page = client, trail, collection, tabs, page
        self.is_open = gr.State(False)
        self.build()
        self.connect()

    def build(self) -> None:
        raise NotImplementedError

    def connect(self) -> None:
        raise NotImplementedError

    def is_selected(self, event: gr.SelectData) -> bool:
        return event.value == self.title


def to_similar() -> gr.Tabs:
    """Selects the tab Similar."""
    return gr.Tabs(selected="similar")
