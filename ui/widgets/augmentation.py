"""The sliders of the augmentation, and named settings for them."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import gradio as gr

Augmentation: TypeAlias = dict[str, Any]  # the fields of training's AugmentSettings

NAMES = ("crop_area", "crop_sampling", "flip", "jitter", "strength", "grey", "blur")
PHOTOGRAPHS: Augmentation = dict(zip(NAMES, ((0.08, 1.0), "torchvision", 0.5, 0.8, 1.0, 0.2, 0.5), strict=True))
NOTHING: Augmentation = dict(zip(NAMES, ((1.0, 1.0), "tensorflow", 0.0, 0.0, 1.0, 0.0, 0.0), strict=True))
TRAINED = "As trained"
PRESETS = {
    "Photographs": PHOTOGRAPHS,
    "CIFAR-10": PHOTOGRAPHS | {"crop_area": (0.2, 1.0), "strength": 0.5, "grey": 0.1, "blur": 0.0},
    "Crop alone": NOTHING | {"crop_area": (0.08, 1.0), "crop_sampling": "torchvision"},
    "Colour alone": NOTHING | {"jitter": 0.8, "grey": 0.2},
    "None": NOTHING,
}


def from_card(card: dict[str, Any]) -> Augmentation | None:
    """The augmentation in an encoder's model card; None if the card has none."""
    augment = ((card.get("training") or {}).get("settings") or {}).get("augment")
    return {**augment, "crop_area": tuple(augment["crop_area"])} if augment and set(augment) == set(NAMES) else None


def controls() -> tuple[list[gr.Slider], gr.Radio]:
    """The controls, in the order that `settings` reads them."""

    def slider(
        label: str, value: float, elem_id: str, least: float = 0.0, most: float = 1.0, step: float = 0.05
    ) -> gr.Slider:
        return gr.Slider(least, most, value=value, step=step, label=label, elem_id=elem_id)

    sliders = [
        slider("Smallest crop area", 0.08, "least-crop", 0.01, step=0.01),
        slider("Largest crop area", 1, "greatest-crop", 0.01, step=0.01),
        slider("Flip probability", 0.5, "flip"),
        slider("Colour probability", 0.8, "jitter"),
        slider("Colour strength", 1, "strength", most=2),
        slider("Grey probability", 0.2, "grey"),
        slider("Blur probability", 0.5, "blur"),
    ]
    sampling = ["torchvision", "tensorflow"]
    return sliders, gr.Radio(sampling, value="torchvision", label="Crops drawn as in", elem_id="sampling")


def settings(values: Sequence[Any]) -> Augmentation:
    """The augmentation that the controls are set to."""
    least, greatest, flip, jitter, strength, grey, blur, sampling = values
    area = (min(least, greatest), max(least, greatest))
    return dict(zip(NAMES, (area, sampling, flip, jitter, strength, grey, blur), strict=True))


def values(settings: Augmentation) -> list[Any]:
    """The values of the controls for this augmentation."""
    others = ("flip", "jitter", "strength", "grey", "blur", "crop_sampling")
    return [*settings["crop_area"], *(settings[name] for name in others)]
