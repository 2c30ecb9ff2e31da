"""How far h moves under each augmentation: what an encoder is sensitive to, and what it has learnt to ignore.

Each augmentation is applied alone, at increasing strength, to the same pictures, and the mean cosine of h(x) and
h(view of x) is measured. Since the mean cosine of two different pictures differs between encoders, it is normalised:
`moved` is (1 - cosine) / (1 - cosine of others), 0 if h does not change and 1 if it moves as far as to
another picture's.
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
from export.paths import at_home
from training.augment import Draws, render
from training.evaluation.table import aligned

if TYPE_CHECKING:
    from training.evaluation.features import Extractor

PICTURES = 256
AT_ONCE = 64  # pictures rendered at once

# Unit and strengths of each augmentation; strength 0 leaves the picture unchanged. Jitter goes up or down at random.
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
    """Mean over the pictures at each strength."""
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
    """Measure all augmentations.

    encode   uint8 (N, S, S, 3) -> h (N, d) float
    pixels   uint8 (N, S, S, 3), N >= 2
    raises   ValueError for fewer pictures; any error of `encode`
    """
    n = len(pixels)
    if not n >= 2:
        raise ValueError(f"sensitivity compares pictures and needs at least 2, not {n}")
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
    """Pictures uint8 (N, S, S, 3) after one augmentation. The seed decides up or down, and where to cut."""
    generator, changed = torch.Generator().manual_seed(seed), []
    for start in range(0, len(pixels), AT_ONCE):
        images = torch.from_numpy(np.ascontiguousarray(pixels[start : start + AT_ONCE]))
        draws = _changed(_unchanged(*images.shape[:3]), augmentation, strength, generator)
        rendered = render(images, draws, images.shape[1])  # (n, 3, S, S)
        changed.append((rendered.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy())
    return np.concatenate(changed)


def _unchanged(n: int, height: int, width: int) -> Draws:
    def full(value: float) -> Tensor:
        return torch.full((n,), value)

    return Draws(
        *(full(float(side)) for side in (0, 0, height, width)),
        flip=full(False),
        brightness=full(1.0),
        contrast=full(1.0),
        saturation=full(1.0),
        hue=full(0.0),
        blend_order=torch.arange(3).repeat(n, 1),
        hue_place=full(3),
        grey=full(False),
        sigma=full(0.0),
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
    """The encoder that `name` stands for with random weights; None if its architecture is not known."""
    from training import zoo  # here, so that the service, which only needs the curves, does not load it
    from training.checkpoint import CheckpointError
    from training.evaluation.features import PIXELS, RANDOM, open_encoder
    from training.initial import checkpoint_of

    path = Path(at_home(name))
    if name == PIXELS or name.endswith(RANDOM):
        return None
    if (path / CARD).exists():
        try:
            path = checkpoint_of(path)
        except CheckpointError:  # exported from a checkpoint that is not here
            return None
    if path.exists():
        return None if path.suffix == ".onnx" else open_encoder(f"{path}{RANDOM}", size_px)
    return open_encoder(zoo.untrained(name), size_px)


def sentence(result: Sensitivity) -> str:
    """Names the augmentations that move h most and least at the greatest strengths, and gives advice."""
    curves = sorted(result.curves, key=lambda curve: curve.moved[-1])
    least, most = curves[0], curves[-1]
    at = f"{most.strengths[-1]:g}, {most.unit}"
    return (
        f"{result.encoder} notices {most.augmentation} most ({at}: h moves {most.moved[-1]:.0%} of the way to another "
        f"picture's) and {least.augmentation} least ({least.moved[-1]:.0%}): pretrain with more of the "
        "augmentations that should not matter when pictures are compared, and with less of those that should."
    )


def table(results: Sequence[Sensitivity]) -> str:
    """Cosine, and in brackets `moved`: one line per strength, one column per encoder."""
    lines = [["augmentation", "strength", *(result.encoder for result in results)]]
    for i, curve in enumerate(results[0].curves):
        for j, strength in enumerate(curve.strengths):
            cells = [f"{result.curves[i].cosines[j]:.3f} ({result.curves[i].moved[j]:.0%})" for result in results]
            lines.append([curve.augmentation, f"{strength:g}", *cells])
    lines.append(["another picture", "", *(f"{result.others:.3f}" for result in results)])
    return aligned(lines)


def write(path: Path, results: Sequence[Sensitivity]) -> None:
    """One panel per augmentation, one curve per encoder; dotted: the mean cosine of two different pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(2, 4, sharey=True)
    for i, axis in enumerate(panels.flat):
        for colour, result in enumerate(results):
            curve = result.curves[i]
            axis.plot((0, *curve.strengths), (1, *curve.cosines), f"C{colour}", marker="o", label=result.encoder)
            axis.axhline(result.others, color=f"C{colour}", linestyle=":")
        axis.set(title=results[0].curves[i].augmentation, xlabel=results[0].curves[i].unit)
    for axis in panels[:, 0]:
        axis.set_ylabel("mean cosine of h(x) and h(view)")
    panels[0, 0].legend(fontsize=7)
    figure.suptitle(f"How far h moves, {results[0].pictures:,} pictures; dotted: two different pictures")
    figure.savefig(path, dpi=80)
    plt.close(figure)
