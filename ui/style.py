"""The theme: warm greys, so that only the pictures are colourful. System fonts only."""

import gradio as gr

SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
ICON = (
    '<link rel="icon" href="data:image/svg+xml,'
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E%3Crect x='3' y='3' width='19' height='19' rx='5'"
    " fill='%235eead4'/%3E%3Crect x='10' y='10' width='19' height='19' rx='5' fill='%230f766e'/%3E%3C/svg%3E\">"
)


def theme() -> gr.themes.Base:
    return gr.themes.Base(primary_hue="teal", secondary_hue="teal", neutral_hue="stone", font=SANS, font_mono=MONO).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary_dark="*neutral_900",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_padding="0px",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_300",
        block_title_text_weight="400",
        border_color_accent="*primary_700",
        color_accent="*primary_700",
        form_gap_width="0px",
        input_background_fill="transparent",
        input_background_fill_dark="transparent",
        slider_color="*primary_700",
        slider_color_dark="*primary_500",
        button_border_width="1px",
        button_border_width_dark="1px",
        button_secondary_background_fill="*background_fill_primary",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_900",
        button_secondary_background_fill_hover_dark="*neutral_800",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_small_text_weight="500",
    )
