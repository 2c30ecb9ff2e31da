"""Augmented views of pictures, exactly as pretraining draws them. Needs torch, which only this part of the service
loads, and only when first asked."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
from PIL import Image

from serving.errors import Malformed, NotOffered


def draw_views(pixels: np.ndarray, each: int, seed: int, settings: dict[str, list[str]]) -> np.ndarray:
    """`each` views of each picture, those of one picture behind each other.

    pixels    uint8 (N, S, S, 3), as the encoder sees the pictures: what pretraining's augmentation starts from
    settings  fields of AugmentSettings as a form gives them: a list of texts each, two for crop_area
    returns   uint8 (N * each, S, S, 3); the same for the same arguments
    raises    Malformed, and NotOffered where training's code or torch is left out
    """
    with offered():
        import torch

        from training.augment import AugmentSettings, augment

    chosen = _parse(settings, AugmentSettings)
    generator = torch.Generator().manual_seed(seed)
    images = torch.tensor(pixels).repeat_interleave(each, dim=0)
    views = augment(images, chosen, generator, size_px=pixels.shape[1])  # (N * each, 3, S, S) in [0, 1]
    return (views * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@contextmanager
def offered() -> Iterator[None]:
    """For imports of training's code. raises NotOffered where it cannot be imported.

    torch keeps to one core: of several it has threads that wait for each other by spinning, which takes many times as
    long where embedding is at work on the same cores, and holds that up.
    """
    try:
        import torch

        torch.set_num_threads(1)
        yield
    except ImportError as error:
        raise NotOffered("this service was built without training's code, so it draws no views") from error


def _parse(form: dict[str, list[str]], kind: type):
    """An instance of the dataclass `kind`, each text read as its field's default is."""
    defaults = {field.name: field.default for field in fields(kind)}
    parsed = {}
    for name, texts in form.items():
        if name not in defaults:
            raise Malformed(f"{name} is no setting of the augmentation; there are {', '.join(defaults)}", name)
        default = defaults[name]
        try:
            values = texts if isinstance(default, str) else [float(text) for text in texts]
        except ValueError:
            raise Malformed(f"{name} must be a number, not {texts[0]!r}", name) from None
        expected = len(default) if isinstance(default, tuple) else 1
        if len(values) != expected:
            raise Malformed(f"{name} takes {expected} value{'s' * (expected > 1)}, not {len(values)}", name)
        parsed[name] = tuple(values) if isinstance(default, tuple) else values[0]
    try:
        return kind(**parsed)
    except ValueError as error:
        raise Malformed(str(error)) from error


def png_uri(pixels: np.ndarray) -> str:
    """uint8 (S, S, 3) -> a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
