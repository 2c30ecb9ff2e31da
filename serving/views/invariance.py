"""How far h moves as one augmentation grows, as a mean over a sample of pictures and for one picture: the curves of
training/evaluation/sensitivity.py, for the encoder that is served and for an untrained one of the same architecture.
Needs torch, which is loaded at the first request."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from export.artifact import ModelCard
from serving.collection.index import unit
from serving.views.draw import training_imports

if TYPE_CHECKING:
    import torch

    from training.evaluation.sensitivity import Sensitivity, SensitivityCurve

DRAWS = 8  # views of each picture at each strength: where it is cropped, and the sign of a change, are random
CACHED = 2  # untrained encoders

Encode = Callable[[np.ndarray], np.ndarray]  # uint8 (n, S, S, 3) -> (n, d)


@dataclass(frozen=True)
class ComparedEncoders:
    trained: "Sensitivity"
    untrained: "Sensitivity | None"
    """The same architecture with the initial weights of its run; None if they are not known."""
    sentence: str
    """Which augmentations move h most and least."""


@dataclass(frozen=True)
class FollowedPicture:
    curves: "tuple[SensitivityCurve, ...]"
    strips: dict[str, np.ndarray]
    """By augmentation: uint8 (strengths, S, S, 3), the picture at each strength."""


def compare_encoders(
    encode: Encode, pixels: np.ndarray, seed: int, card: ModelCard, check: Callable[[], None]
) -> ComparedEncoders:
    """The mean over a sample, for the served encoder and an untrained one.

    encode  the served encoder, whose model card is `card`
    pixels  uint8 (N, S, S, 3), N >= 2
    check   called between the steps; raises to cancel the work
    raises  NotOffered; whatever `encode` and `check` raise
    """
    with training_imports():
        import torch

        from training.evaluation.sensitivity import sensitivity, sentence

    def measure(embed: "Callable[[np.ndarray], torch.Tensor]", name: str) -> "Sensitivity":
        def checked(pixels: np.ndarray) -> torch.Tensor:
            check()
            return embed(pixels)

        return sensitivity(checked, pixels, name, seed)

    trained = measure(lambda pixels: torch.from_numpy(encode(pixels)), "This encoder")
    run_seed = (card.training.get("settings") or {}).get("seed", 0)
    untrained = _untrained(card.architecture, pixels.shape[1], run_seed) if card.training else None
    initial = measure(untrained, "untrained") if untrained else None
    return ComparedEncoders(trained, initial, sentence(trained))


def follow_picture(
    encode: Encode, pixels: np.ndarray, others: float, seed: int, check: Callable[[], None]
) -> FollowedPicture:
    """The same curves for one picture, uint8 (S, S, 3). others: mean cosine of two different pictures, where `moved`
    is 1. raises as compare_encoders"""
    with training_imports():
        from training.evaluation.sensitivity import STRENGTHS, SensitivityCurve, views

    curves, strips, h = [], {}, unit(encode(pixels[None]))[0]
    for name, (measured_in, strengths) in STRENGTHS.items():
        cosines, strip = [], []
        for strength in strengths:
            check()
            drawn = views(pixels[None].repeat(DRAWS, axis=0), name, strength, seed)
            cosines.append(float((unit(encode(drawn)) @ h).mean()))
            strip.append(drawn[0])
        moved = tuple((1 - cosine) / (1 - others) for cosine in cosines)
        curves.append(SensitivityCurve(name, measured_in, strengths, tuple(cosines), moved))
        strips[name] = np.stack(strip)
    return FollowedPicture(tuple(curves), strips)


@lru_cache(CACHED)
def _untrained(architecture: str, size_px: int, seed: int) -> "Callable[[np.ndarray], torch.Tensor] | None":
    """h by the architecture with the initial weights of a run with that seed; None if training does not know it."""
    import torch

    from training.encoders import ARCHITECTURES, ResNetEncoder, embed

    match = re.fullmatch(r"(\w+)(?:-(\d)x)?", architecture)
    if not match or match[1] not in ARCHITECTURES:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return partial(embed, ResNetEncoder(match[1], int(match[2] or 1), size_px))
