"""How far h moves as one augmentation grows, over a sample of pictures and for one: sensitivity.py's curves of
the encoder that is served, beside those of the same architecture untrained. Needs torch, loaded when first asked."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from export.artifact import ModelCard
from serving.collection.index import unit
from serving.views.draw import offered

if TYPE_CHECKING:
    import torch

    from training.evaluation.sensitivity import Sensitivity, SensitivityCurve

DRAWS = 8  # of the views of a picture on its own, which are random in where they are cut, and up or down
KEPT = 2  # untrained encoders

Encode = Callable[[np.ndarray], np.ndarray]  # uint8 (n, S, S, 3) -> (n, d)


@dataclass(frozen=True)
class Compared:
    trained: "Sensitivity"
    untrained: "Sensitivity | None"
    """Of the same architecture, as its run began; None where that is not known."""
    sentence: str
    """What is noticed most and least."""


@dataclass(frozen=True)
class Followed:
    curves: "tuple[SensitivityCurve, ...]"
    strips: dict[str, np.ndarray]
    """By augmentation: uint8 (strengths, S, S, 3), the picture at each of its strengths."""


def compare(encode: Encode, pixels: np.ndarray, seed: int, card: ModelCard, go_on: Callable[[], None]) -> Compared:
    """Mean over a sample.

    encode  by the encoder that is served
    pixels  uint8 (N, S, S, 3), N >= 2
    card    of that encoder
    go_on   is called between the steps, and may raise
    raises  NotOffered; whatever `encode` and `go_on` raise
    """
    with offered():
        import torch

        from training.evaluation.sensitivity import sensitivity, sentence

    def of(extract: "Callable[[np.ndarray], torch.Tensor]", name: str) -> "Sensitivity":
        def encode(pixels: np.ndarray) -> torch.Tensor:
            go_on()
            return extract(pixels)

        return sensitivity(encode, pixels, name, seed)

    trained = of(lambda pixels: torch.from_numpy(encode(pixels)), "This encoder")
    seed_of_run = (card.training.get("settings") or {}).get("seed", 0)
    twin = _untrained(card.architecture, pixels.shape[1], seed_of_run) if card.training else None
    return Compared(trained, twin and of(twin, "untrained"), sentence(trained))


def follow(encode: Encode, pixels: np.ndarray, others: float, seed: int, go_on: Callable[[], None]) -> Followed:
    """One picture, uint8 (S, S, 3); others: mean cosine of two different ones, where `moved` is 1."""
    with offered():
        from training.evaluation.sensitivity import STRENGTHS, SensitivityCurve, views

    curves, strips, h = [], {}, unit(encode(pixels[None]))[0]
    for name, (measured_in, strengths) in STRENGTHS.items():
        cosines, strip = [], []
        for strength in strengths:
            go_on()
            drawn = views(pixels[None].repeat(DRAWS, axis=0), name, strength, seed)
            cosines.append(float((unit(encode(drawn)) @ h).mean()))
            strip.append(drawn[0])
        moved = tuple((1 - cosine) / (1 - others) for cosine in cosines)
        curves.append(SensitivityCurve(name, measured_in, strengths, tuple(cosines), moved))
        strips[name] = np.stack(strip)
    return Followed(tuple(curves), strips)


@lru_cache(KEPT)
def _untrained(architecture: str, size_px: int, seed: int) -> "Callable[[np.ndarray], torch.Tensor] | None":
    """h of the architecture as a run of that seed begins; None of one that training does not know."""
    import torch

    from training.encoders import ARCHITECTURES, Encoder, embed

    told = re.fullmatch(r"(\w+)(?:-(\d)x)?", architecture)
    if not told or told[1] not in ARCHITECTURES:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return partial(embed, Encoder(told[1], int(told[2] or 1), size_px))
