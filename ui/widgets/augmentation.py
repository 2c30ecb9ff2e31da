"""The sliders of the augmentation, and named settings for them."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import gradio as gr

Augmentation: TypeAlias = dict[str, Any]  # the fields of training's AugmentSettings

PHOTOGRAPHS: Augmentation = {
    "crop_area": (0.08, 1.0),
    "crop_sampling": "torchvision",
    "crop_aspect": 4 / 3,
    "flip": 0.5,
    "vertical_flip": 0.0,
    "quarter_turns": 0.0,
    "rotation": 0.0,
    "gamma": 0.0,
    "jitter": 0.8,
    "strength": 1.0,
    "grey": 0.2,
    "blur": 0.5,
}
NOTHING = PHOTOGRAPHS | {"crop_area": (1.0, 1.0), "crop_sampling": "tensorflow"}
NOTHING |= dict.fromkeys(("flip", "jitter", "grey", "blur"), 0.0)
ANY_WAY_UP = {"vertical_flip": 0.5, "quarter_turns": 0.75}
OTHERS = (  # in the order of the controls after those of the crop's area
    *("crop_aspect", "flip", "vertical_flip", "quarter_turns", "rotation", "gamma"),
    *("jitter", "strength", "grey", "blur", "crop_sampling"),
)
TRAINED = "As trained"
PRESETS = {
    "Photographs": PHOTOGRAPHS,
    "CIFAR-10": PHOTOGRAPHS | {"crop_area": (0.2, 1.0), "strength": 0.5, "grey": 0.1, "blur": 0.0},
    "Aerial": PHOTOGRAPHS | ANY_WAY_UP | {"crop_area": (0.2, 1.0), "strength": 0.5, "grey": 0.1},
    "Microscopy": PHOTOGRAPHS
    | ANY_WAY_UP
    | {"crop_area": (0.2, 1.0), "crop_aspect": 1.0, "gamma": 0.5, "strength": 0.3, "grey": 0.0, "blur": 0.2},
    "Crop alone": NOTHING | {"crop_area": (0.08, 1.0), "crop_sampling": "torchvision"},
    "Colour alone": NOTHING | {"jitter": 0.8, "grey": 0.2},
    "None": NOTHING,
}


def from_card(card: dict[str, Any]) -> Augmentation | None:
    """The augmentation in an encoder's model card; None if the card has none."""
    augment = ((card.get("training") or {}).get("settings") or {}).get("augment")
    if not augment or "crop_area" not in augment or not set(augment) <= set(PHOTOGRAPHS):
        return None
    return PHOTOGRAPHS | augment | {"crop_area": tuple(augment["crop_area"])}  # an older card lacks some settings


def controls() -> tuple[list[gr.Slider], gr.Radio]:
    """The controls, in the order that `settings` reads them."""

    def slider(
        label: str, value: float, elem_id: str, least: float = 0.0, most: float = 1.0, step: float = 0.05
    ) -> gr.Slider:
        return gr.Slider(least, most, value=value, step=step, label=label, elem_id=elem_id)

    sliders = [
        slider("Smallest crop area", 0.08, "least-crop", 0.01, step=0.01),
        slider("Largest crop area", 1, "greatest-crop", 0.01, step=0.01),
        slider("Largest crop aspect", 4 / 3, "crop-aspect", 1, most=4, step=0.01),
        slider("Flip probability", 0.5, "flip"),
        slider("Upside-down flip probability", 0, "vertical-flip"),
        slider("Quarter turn probability", 0, "quarter-turns"),
        slider("Largest rotation, degrees", 0, "rotation", most=180, step=5),
        slider("Gamma", 0, "gamma", most=2),
        slider("Colour probability", 0.8, "jitter"),
        slider("Colour strength", 1, "strength", most=2),
        slider("Grey probability", 0.2, "grey"),
        slider("Blur probability", 0.5, "blur"),
    ]
    sampling = ["torchvision", "tensorflow"]
    return sliders, gr.Radio(sampling, value="torchvision", label="Crops drawn as in", elem_id="sampling")


def settings(values: Sequence[Any]) -> Augmentation:
    """The augmentation that the controls are set to."""
    least, greatest, *others = values
    area = (min(least, greatest), max(least, greatest))
    return {"crop_area": area} | dict(zip(OTHERS, others, strict=True))


def values(settings: Augmentation) -> list[Any]:
    """The values of the controls for this augmentation."""
    return [*settings["crop_area"], *(settings[name] for name in OTHERS)]
