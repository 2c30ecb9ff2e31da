"""How far h moves under each augmentation: what an encoder notices, and what it has learnt to ignore.

Each augmentation alone, at growing strength, on the same pictures: the mean cosine of h(x) and h(view of x). What
counts is where it lies between 1 and the mean cosine of two different pictures, which each encoder has of its own:
`moved` is (1 - cosine) / (1 - cosine of others), 0 where h stays and 1 where it might be another picture's.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.artifact import CARD
from training.augment import Draws, render

if TYPE_CHECKING:
    from training.evaluation.features import Extractor

PICTURES = 256
AT_ONCE = 64  # pictures rendered

# Strengths, each in its own unit; at the first, which is left out, the picture stays as it is. Jitter goes up or down.
STRENGTHS = {
    "crop": ("share of the area that is cut away", (0.2, 0.4, 0.6, 0.8, 0.92)),
    "flip": ("share of pictures flipped", (1.0,)),
    "brightness": ("factor 1 + or -", (0.2, 0.4, 0.6, 0.8)),
    "contrast": ("factor 1 + or -", (0.2, 0.4, 0.6, 0.8)),
    "saturation": ("factor 1 + or -", (0.2, 0.4, 0.6, 0.8)),
    "hue": ("turns of the circle", (0.05, 0.1, 0.2, 0.5)),
    "grey": ("share of pictures made grey", (1.0,)),
    "blur": ("sigma in pixels", (0.5, 1.0, 2.0)),
}


@dataclass(frozen=True)
class SensitivityCurve:
    augmentation: str
    unit: str
    strengths: tuple[float, ...]
    cosines: tuple[float, ...]
    """Mean over the pictures, at each strength."""
    moved: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    encoder: str
    pictures: int
    others: float
    """Mean cosine of two different pictures."""
    curves: tuple[SensitivityCurve, ...]

    def to_dict(self) -> dict:
        return asdict(self)


def sensitivity(
    encode: Callable[[np.ndarray], Tensor], pixels: np.ndarray, name: str = "encoder", seed: int = 0
) -> Sensitivity:
    """
    encode   uint8 (N, S, S, 3) -> h (N, d) float
    pixels   uint8 (N, S, S, 3), N >= 2
    raises   ValueError; whatever `encode` raises
    """
    n = len(pixels)
    if not n >= 2:
        raise ValueError(f"sensitivity compares pictures and wants at least 2, not {n}")
    h = F.normalize(encode(pixels), dim=1)
    others = float(((h.sum(dim=0).square().sum() - n) / (n * (n - 1))).clamp(max=1 - 1e-6))
    curves = []
    for augmentation, (unit, strengths) in STRENGTHS.items():
        cosines = [
            F.cosine_similarity(h, encode(views(pixels, augmentation, strength, seed)), dim=1).mean().item()
            for strength in strengths
        ]
        moved = [(1 - cosine) / (1 - others) for cosine in cosines]
        curves.append(SensitivityCurve(augmentation, unit, strengths, tuple(cosines), tuple(moved)))
    return Sensitivity(name, n, others, tuple(curves))


def views(pixels: np.ndarray, augmentation: str, strength: float, seed: int = 0) -> np.ndarray:
    """uint8 (N, S, S, 3) -> the same shape, each picture changed in one way: up or down, and cut where, by the seed."""
    generator, changed = torch.Generator().manual_seed(seed), []
    for start in range(0, len(pixels), AT_ONCE):
        images = torch.from_numpy(np.ascontiguousarray(pixels[start : start + AT_ONCE]))
        draws = _changed(_unchanged(*images.shape[:3]), augmentation, strength, generator)
        shown = render(images, draws, images.shape[1])  # (n, 3, S, S)
        changed.append((shown.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy())
    return np.concatenate(changed)


def _unchanged(n: int, height: int, width: int) -> Draws:
    def of(value) -> Tensor:
        return torch.full((n,), value)

    return Draws(
        *(of(float(side)) for side in (0, 0, height, width)),
        flip=of(False),
        brightness=of(1.0),
        contrast=of(1.0),
        saturation=of(1.0),
        hue=of(0.0),
        blend_order=torch.arange(3).repeat(n, 1),
        hue_place=of(3),
        grey=of(False),
        sigma=of(0.0),
    )


def _changed(draws: Draws, augmentation: str, strength: float, generator: torch.Generator) -> Draws:
    n = len(draws.flip)
    if augmentation == "crop":
        height, width = ((side * (1 - strength) ** 0.5).round().clamp(min=1) for side in (draws.height, draws.width))
        top, left = (
            (torch.rand(n, generator=generator) * (whole - part + 1)).floor()
            for whole, part in ((draws.height, height), (draws.width, width))
        )
        return draws._replace(top=top, left=left, height=height, width=width)
    if augmentation in ("flip", "grey"):
        return draws._replace(**{augmentation: torch.rand(n, generator=generator) < strength})
    if augmentation == "blur":
        return draws._replace(sigma=torch.full((n,), strength))
    shift = strength * torch.randint(0, 2, (n,), generator=generator).mul(2).sub(1)
    return draws._replace(**{augmentation: getattr(draws, augmentation) + shift})


def untrained(name: str, size_px: int | None) -> "Extractor | None":
    """The same architecture as the encoder that `name` stands for, not trained; None where that is not known."""
    from training import zoo  # here, so that the service, which wants the curves alone, loads no more than it must
    from training.checkpoint import CheckpointError
    from training.evaluation.features import PIXELS, RANDOM, open_encoder
    from training.initial import checkpoint_of

    path = Path(name).expanduser()
    if name == PIXELS or name.endswith(RANDOM):
        return None
    if (path / CARD).exists():
        try:
            path = checkpoint_of(path)
        except CheckpointError:  # the export is on its own
            return None
    if path.exists():
        return None if path.suffix == ".onnx" else open_encoder(f"{path}{RANDOM}", size_px)
    return open_encoder(f"{name.partition(':')[0]}:{zoo.RANDOM}", size_px)


def sentence(found: Sensitivity) -> str:
    """What it notices most and least, at the greatest strengths, and what follows for a choice of augmentations."""
    by = sorted(found.curves, key=lambda curve: curve.moved[-1])
    least, most = by[0], by[-1]
    at = f"{most.strengths[-1]:g}, {most.unit}"
    return (
        f"{found.encoder} notices {most.augmentation} most ({at}: h goes {most.moved[-1]:.0%} of the way to another "
        f"picture's) and {least.augmentation} least ({least.moved[-1]:.0%}): pretrain with more of what should not "
        "count when pictures are compared, and with less of what should."
    )


def table(all_of: Sequence[Sensitivity]) -> str:
    """Cosine, and in brackets how far of the way to another picture: a line a strength, a column an encoder."""
    lines = [["augmentation", "strength", *(found.encoder for found in all_of)]]
    for i, curve in enumerate(all_of[0].curves):
        for j, strength in enumerate(curve.strengths):
            cells = [f"{found.curves[i].cosines[j]:.3f} ({found.curves[i].moved[j]:.0%})" for found in all_of]
            lines.append([curve.augmentation, f"{strength:g}", *cells])
    lines.append(["another picture", "", *(f"{found.others:.3f}" for found in all_of)])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in lines
    )


def write(path: Path, all_of: Sequence[Sensitivity]) -> None:
    """A panel an augmentation, a curve an encoder; dotted, the cosine of two different pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(2, 4, sharey=True)
    for i, axis in enumerate(panels.flat):
        for colour, found in enumerate(all_of):
            curve = found.curves[i]
            axis.plot((0, *curve.strengths), (1, *curve.cosines), f"C{colour}", marker="o", label=found.encoder)
            axis.axhline(found.others, color=f"C{colour}", linestyle=":")
        axis.set(title=curve.augmentation, xlabel=curve.unit)
    for axis in panels[:, 0]:
        axis.set_ylabel("mean cosine of h(x) and h(view)")
    panels[0, 0].legend(fontsize=7)
    figure.suptitle(f"How far h moves, {all_of[0].pictures:,} pictures; dotted: two different pictures")
    figure.savefig(path, dpi=80)
    plt.close(figure)
