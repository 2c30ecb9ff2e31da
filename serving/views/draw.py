"""Augmented views of pictures, exactly as pretraining draws them. Needs torch, which only serving/views loads, at
the first request for views."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from serving.errors import Malformed, NotOffered

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def draw_views(pixels: np.ndarray, each: int, seed: int, settings: dict[str, list[str]]) -> np.ndarray:
    """`each` views of each picture.

    pixels    uint8 (N, S, S, 3), as the encoder sees the pictures: what pretraining's augmentation starts from
    settings  fields of AugmentSettings, each with its values in a form: one text, two for crop_area
    returns   uint8 (N * each, S, S, 3), the views of one picture together; the same for the same arguments
    raises    Malformed; NotOffered if training's code or torch is not installed
    """
    with training_imports():
        import torch

        from training.augment import AugmentSettings, augment

    chosen = _parse(settings, AugmentSettings)
    generator = torch.Generator().manual_seed(seed)
    images = torch.tensor(pixels).repeat_interleave(each, dim=0)
    views = augment(images, chosen, generator, size_px=pixels.shape[1])  # (N * each, 3, S, S) in [0, 1]
    return (views * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@contextmanager
def training_imports() -> Iterator[None]:
    """Import training's code inside. Raises NotOffered if it cannot be imported.

    Limits torch to one core: its threads on several cores spin while they wait for each other, which slows down both
    itself and the embedding that runs on the same cores.
    """
    try:
        import torch

        torch.set_num_threads(1)
        yield
    except ImportError as error:
        raise NotOffered("this service was built without training's code, so it cannot draw views") from error


def _parse(form: dict[str, list[str]], kind: type[T]) -> T:
    """Returns an instance of the dataclass `kind`; each text is converted to the type of the field's default."""
    defaults = {field.name: field.default for field in fields(kind)}
    parsed: dict[str, Any] = {}
    for name, texts in form.items():
        if name not in defaults:
            raise Malformed(f"{name} is not an augmentation setting; the settings are {', '.join(defaults)}", name)
        default = defaults[name]
        try:
            values = texts if isinstance(default, str) else [float(text) for text in texts]
        except ValueError:
            raise Malformed(f'{name}: "{texts[0][:80]}" is not a number', name) from None
        expected = len(default) if isinstance(default, tuple) else 1
        if len(values) != expected:
            raise Malformed(f"{name} takes {expected} value{'s' * (expected > 1)}, not {len(values)}", name)
        parsed[name] = tuple(values) if isinstance(default, tuple) else values[0]
    try:
        return kind(**parsed)
    except ValueError as error:
        raise Malformed(str(error)) from error


def png_uri(pixels: np.ndarray) -> str:
    """uint8 (S, S, 3) -> a PNG file as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
