"""How the page looks: a quiet frame in warm greys around the pictures, which bring the colour. System fonts only."""

import gradio as gr

SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
ICON = (
    '<link rel="icon" href="data:image/svg+xml,'
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E%3Crect x='3' y='3' width='19' height='19' rx='5'"
    " fill='%235eead4'/%3E%3Crect x='10' y='10' width='19' height='19' rx='5' fill='%230f766e'/%3E%3C/svg%3E\">"
)

# A slider tells its value when a pointer lets go of it; arrow keys and Enter should do as much.
KEYS = """<script>
document.addEventListener("keyup", ({ target, key }) => {
    if (target.type === "range") target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
    if (target.type === "number" && key === "Enter") target.blur();
});
</script>"""


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


CSS = """
.gradio-container > main {
  max-width: 1480px !important; margin: 0 auto !important; padding: 26px 28px 60px !important;
}
.masthead { display: flex; align-items: baseline; gap: 4px 14px; flex-wrap: wrap; margin: 0; }
.masthead h1 { font-size: 25px; font-weight: 650; letter-spacing: -0.02em; margin: 0; }
.masthead p { margin: 0; color: var(--body-text-color-subdued); }

#top { align-items: center; justify-content: space-between; gap: 12px; margin-bottom: 10px; }
#collection { flex: 0 0 220px; }

/* The picture that is looked at stands beside the tabs, and above them where the window is narrow. */
#frame { display: grid; grid-template-columns: 270px minmax(0, 1fr); gap: 40px; align-items: start; }
#side { position: sticky; top: 24px; gap: 14px; min-width: 0 !important; }
#main { min-width: 0 !important; }
.small {
  display: inline-block; padding: 4px 11px; border: 1px solid var(--neutral-300); border-radius: 8px; cursor: pointer;
  font: 500 13px/1.4 var(--font); color: var(--body-text-color); background: var(--background-fill-primary);
}
.dark .small { border-color: var(--neutral-700); }
.small[hidden] { display: none; }
.small:hover { background: var(--neutral-100); }
.dark .small:hover { background: var(--neutral-800); }
.small:focus-visible, .small:focus-within { outline: 2px solid var(--primary-500); outline-offset: 2px; }
.small.strong { color: white; background: var(--primary-700); border-color: var(--primary-700); }
.unseen { position: absolute !important; width: 0; height: 0; overflow: hidden; }

.facts, .caption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 8px; font-size: 13px; }
.name {
  min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--body-text-color-subdued);
}
.label { font-weight: 500; color: var(--body-text-color); white-space: nowrap; }
.label + .name { flex-basis: 100%; font-size: 12px; }
.score { font-variant-numeric: tabular-nums; font-weight: 650; color: var(--primary-700); }
.score + .name { flex: 1; }
.dark .score { color: var(--primary-400); }

.heading h2 { font-size: 17px; font-weight: 600; margin: 0 0 2px; letter-spacing: -0.01em; }
.heading p, .explanation { margin: 0; color: var(--body-text-color-subdued); line-height: 1.5; }
.explanation { max-width: 96ch; text-wrap: pretty; }
.pairs { list-style: none; padding: 0; margin: 0; display: grid; }

.dark #tabs button.selected { color: var(--primary-400); }
.dark #tabs button.selected::after { background: var(--primary-400); }

/* Sliders: name and number on one line, the track below. */
.form { background: none; border: 0; overflow: visible; }
.form > .block { overflow: visible !important; padding-bottom: 6px; min-width: 0 !important; }
.form .head { align-items: center; margin-bottom: 4px; }
.form .head span { margin: 0; }
.form input[type="number"] {
  width: 6ch; padding: 2px 4px; text-align: right; font-variant-numeric: tabular-nums; color: var(--body-text-color);
}
.form .min_value, .form .max_value { display: none; }
.form input[type="range"] { min-width: 0; }
.form input[type="range"]:focus-visible { outline: 2px solid var(--primary-500); outline-offset: 6px; }
.form input::-webkit-slider-thumb {
  background: var(--background-fill-primary); box-shadow: 0 0 0 2px var(--slider-color);
}
.form input::-moz-range-thumb {
  background: var(--background-fill-primary); box-shadow: 0 0 0 2px var(--slider-color);
}
.dark .form input::-webkit-slider-runnable-track {
  background: linear-gradient(
    to right, var(--slider-color) var(--range_progress), var(--neutral-700) var(--range_progress)
  );
}
.dark .form input::-moz-range-track { background: var(--neutral-700); }
#settings { display: block; }
#settings .form {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(215px, 1fr)); gap: 16px 32px;
}

#drawing { align-items: center; margin-top: 8px; }
#drawing p { margin: 0; }
#drawing i { font-style: normal; color: var(--body-text-color-subdued); margin-left: 10px; }
#drawing button { flex: 0 0 120px; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 18px; }
.pair {
  display: grid; grid-template-columns: 1fr 1fr; gap: 6px; margin: 0; padding: 8px; border-radius: 14px;
  background: var(--background-fill-primary); border: 1px solid var(--border-color-primary);
}
.pair img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 8px; display: block; }
.pair .score { grid-column: 1 / -1; text-align: center; }
/* What takes a moment is dimmed a little, and after half a second says that it is at work. */
.html-container.pending { opacity: 0.55 !important; }
.html-container + .wrap.center, #pairs .wrap.center { animation: appear 0.2s 0.5s both; }
#pairs .meta-text, #pairs .eta-bar { display: none; }
@keyframes appear { from { opacity: 0; } }

.notice {
  margin: 12px 0; padding: 36px 28px; border-radius: 14px; text-align: center; line-height: 1.6;
  color: var(--body-text-color-subdued); border: 1px dashed var(--border-color-primary);
}
.notice::first-letter { text-transform: uppercase; }
.notice code { font-family: var(--font-mono); font-size: 0.93em; color: var(--body-text-color); }

@media (max-width: 760px) {
  .gradio-container > main { padding: 16px 14px 40px !important; }
  #tabs .tab-container button { font-size: 12.5px; padding: 0 4px; }  /* all six side by side at 390 px */
  #frame { grid-template-columns: minmax(0, 1fr); gap: 18px; }
  #side { position: static; gap: 10px; }
  #settings .form { grid-template-columns: 1fr 1fr; gap: 12px 20px; }
  #settings .reset-button { display: none; }
  #settings .head span { font-size: 13px; }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); }
}
"""
