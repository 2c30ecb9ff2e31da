"""The sliders of the augmentation, and what they are set to by name."""

from collections.abc import Sequence

import gradio as gr

NAMES = ("crop_area", "crop_sampling", "flip", "jitter", "strength", "grey", "blur")  # training.augment.AugmentSettings
PHOTOGRAPHS = dict(zip(NAMES, ((0.08, 1.0), "torchvision", 0.5, 0.8, 1.0, 0.2, 0.5), strict=True))
NOTHING = dict(zip(NAMES, ((1.0, 1.0), "tensorflow", 0.0, 0.0, 1.0, 0.0, 0.0), strict=True))
TRAINED = "As trained"
PRESETS = {
    "Photographs": PHOTOGRAPHS,
    "CIFAR-10": PHOTOGRAPHS | {"crop_area": (0.2, 1.0), "strength": 0.5, "grey": 0.1, "blur": 0.0},
    "Crop alone": NOTHING | {"crop_area": (0.08, 1.0), "crop_sampling": "torchvision"},
    "Colour alone": NOTHING | {"jitter": 0.8, "grey": 0.2},
    "None": NOTHING,
}
CSS = """
#presets { gap: 8px; align-items: center; margin: 4px 0 2px; flex-wrap: wrap; }
#presets button { flex: 0 0 auto; min-width: 0 !important; }
#sampling .wrap { gap: 0 4px; }
#sampling label { padding: 2px 6px 2px 0; gap: 6px; font-size: 12px; background: none; border: 0; }
#sampling label span { margin: 0; }
"""


def of_card(card: dict) -> dict | None:
    """What the encoder of this model card was trained with, where the card tells."""
    told = (card.get("training") or {}).get("settings") or {}
    augment = told.get("augment")
    return {**augment, "crop_area": tuple(augment["crop_area"])} if augment and set(augment) == set(NAMES) else None


def controls() -> list[gr.components.Component]:
    """In the order of `settings`."""

    def share(label: str, value: float, elem_id: str, least: float = 0.0, most: float = 1.0, step: float = 0.05):
        return gr.Slider(least, most, value=value, step=step, label=label, elem_id=elem_id)

    return [
        share("Least crop area", 0.08, "least-crop", 0.01, step=0.01),
        share("Greatest crop area", 1, "greatest-crop", 0.01, step=0.01),
        share("Flip probability", 0.5, "flip"),
        share("Colour probability", 0.8, "jitter"),
        share("Colour strength", 1, "strength", most=2),
        share("Grey probability", 0.2, "grey"),
        share("Blur probability", 0.5, "blur"),
        gr.Radio(["torchvision", "tensorflow"], value="torchvision", label="Crops drawn as in", elem_id="sampling"),
    ]


def settings(values: Sequence) -> dict:
    """What the service takes, of the controls' values."""
    least, greatest, flip, jitter, strength, grey, blur, sampling = values
    area = (min(least, greatest), max(least, greatest))
    return dict(zip(NAMES, (area, sampling, flip, jitter, strength, grey, blur), strict=True))


def values(settings: dict) -> list:
    """The other way round."""
    least, greatest = settings["crop_area"]
    return [
        least,
        greatest,
        *(settings[name] for name in ("flip", "jitter", "strength", "grey", "blur", "crop_sampling")),
    ]
