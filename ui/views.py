"""The second tab: pairs of augmented views of a picture, and how alike the encoder finds the two of a pair."""

from html import escape
from statistics import mean

import gradio as gr

from serving.client import Pair, ServiceError
from ui.picture import Chosen, UploadFailed, notice, read

TITLE = "Views"
EXPLANATION = (
    "SimCLR draws two random views of every picture and trains the encoder to place the two views of one picture "
    "close together and those of different pictures apart: whatever the views vary, it learns to overlook."
)
NOTHING = "Choose a picture first: drop one anywhere on this page, or click one under Similar."


async def drawn(client, chosen: Chosen, pairs: int, seed: int, least_crop: float, **settings) -> tuple[str, str]:
    """The mean cosine in words, and the pairs side by side. raises ServiceError, UploadFailed."""
    found = await client.views(
        await read(client, chosen), pairs=int(pairs), seed=int(seed), crop_area=(least_crop, 1.0), **settings
    )
    cosine = mean(pair.similarity for pair in found)
    of = "this pair" if len(found) == 1 else f"these {len(found)} pairs"
    summary = f"<p>Mean cosine of {of} under h: <b>{cosine:.2f}</b> <i>Drawn as small as the encoder sees them.</i></p>"
    return summary, f'<ul class="pairs">{"".join(map(_pair_html, found))}</ul>'


def _pair_html(pair: Pair) -> str:
    images = "".join(
        f'<img src="{escape(view)}" alt="{which} view of the picture">'
        for which, view in zip(("One", "Another"), pair.views, strict=True)
    )
    return f'<li class="pair">{images}<span class="score">{pair.similarity:.2f}</span></li>'


def tab(client, trail: gr.State, tabs: gr.Tabs) -> None:
    """Build the tab. It draws views only while it is the one in sight."""
    gr.HTML(f'<p class="explanation">{EXPLANATION}</p>', apply_default_css=False)
    with gr.Row(elem_id="settings"):
        sliders = {
            "strength": gr.Slider(0, 2, value=1, step=0.05, label="Colour strength", elem_id="strength"),
            "least_crop": gr.Slider(0.05, 1, value=0.08, step=0.01, label="Least crop area", elem_id="least-crop"),
            "blur": gr.Slider(0, 1, value=0.5, step=0.05, label="Blur probability", elem_id="blur"),
            "grey": gr.Slider(0, 1, value=0.2, step=0.05, label="Grey probability", elem_id="grey"),
            "flip": gr.Slider(0, 1, value=0.5, step=0.05, label="Flip probability", elem_id="flip"),
            "pairs": gr.Slider(1, 16, value=6, step=1, label="Pairs", elem_id="pair-count"),
            "seed": gr.Slider(0, 999, value=0, step=1, label="Seed", elem_id="seed"),
        }
    with gr.Row(elem_id="drawing"):
        summary = gr.HTML(apply_default_css=False, elem_id="summary")
        again = gr.Button("Draw again", size="sm", elem_id="again", visible=False)
    pairs = gr.HTML(notice(NOTHING), apply_default_css=False, elem_id="pairs")
    in_sight = gr.State(False)

    async def draw(trail: tuple[Chosen, ...], in_sight: bool, *values):
        if not in_sight:
            return gr.skip()
        if not trail:
            return "", gr.update(visible=False), notice(NOTHING)
        try:
            words, pictures = await drawn(client, trail[-1], **dict(zip(sliders, values, strict=True)))
        except (ServiceError, UploadFailed) as error:
            words, pictures = "", notice(str(error))
        return words, gr.update(visible=True), pictures

    def look(event: gr.SelectData) -> bool:
        return event.value == TITLE

    def next_seed(seed: int) -> int:
        return (int(seed) + 1) % 1000

    silent = {"show_progress": "hidden", "api_visibility": "private"}
    drawing = {"fn": draw, "inputs": [trail, in_sight, *sliders.values()], "outputs": [summary, again, pairs]}
    drawing |= {"show_progress_on": pairs, "trigger_mode": "always_last", "api_visibility": "private"}
    tabs.select(look, None, in_sight, **silent).then(**drawing)
    again.click(next_seed, sliders["seed"], sliders["seed"], **silent).then(**drawing)
    gr.on([trail.change, *(slider.release for slider in sliders.values())], **drawing)
