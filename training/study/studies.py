"""The studies of Chen et al. 2020 (arXiv:2002.05709): the runs of each, the claims, and the figure.

A cell is one combination of settings, run once per seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from statistics import fmean
from typing import Any, Literal

from matplotlib.figure import Figure

from training.config import PretrainSettings
from training.study import plots
from training.study.cell import COMMIT
from training.study.factors import GREY, NAMES, NUMBERS
from training.study.verdict import Claim, RunRow, SeedGroup

QUALITY = ("linear h", "linear z", "kNN h", "views matched z")
HEADS: dict[str, Literal[0, 1, 2]] = {"none": 0, "linear": 1, "non-linear": 2}
DIMENSIONS = (32, 128, 512)
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0)
BATCHES, LENGTHS = (32, 128, 512), (0.5, 1, 2)  # lengths are multiples of --epochs
SMALL, LARGE, SHORT, LONG = BATCHES[0], BATCHES[-1], LENGTHS[0], LENGTHS[-1]
LOSS_NAMES = {"nt_xent": "NT-Xent", "dcl": "DCL"}
PAPER: dict[str, Any] = {"views": 2, "loss": "NT-Xent"}  # labels
STRENGTHS = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)
SINGLE: dict[str, dict[str, Any]] = {
    "crop": {"crop_area": None},  # that of the base settings
    "flip": {"flip": 0.5},
    "colour": {"jitter": 0.8, "strength": 1.0, "grey": 0.2},
    "blur": {"blur": 1.0},
}
UNCHANGED: dict[str, Any] = {"crop_area": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
FACTOR_GROUPS = {
    "colour": ("hue", "saturation", "value", GREY),
    "orientation": ("orientation",),
    "scale and position": ("scale", "x", "y"),
    "class": ("class",),
}
FACTORS = (GREY, *(name.removesuffix("_deg") for name in NUMBERS), *NAMES)


@dataclass(frozen=True)
class Cell:
    labels: dict
    settings: PretrainSettings


def row_per_cell(cells: list[Cell], results: list[list[dict]]) -> list[RunRow]:
    return [
        RunRow(cell.labels, {name: [run[name] for run in seeds] for name in seeds[0] if name != COMMIT})
        for cell, seeds in zip(cells, results, strict=True)
    ]


def rows_of_differences(cells: list[Cell], results: list[list[dict]]) -> list[RunRow]:
    """Adds 'linear h - z' of each run, as h and z of one run are not independent; without a head z is h."""
    rows = row_per_cell(cells, results)
    for row in rows:
        if row.labels["head"] != "none":
            pairs = zip(row.values["linear h"], row.values["linear z"], strict=True)
            row.values["linear h - z"] = [h - z for h, z in pairs]
    return rows


def row_per_factor(cells: list[Cell], results: list[list[dict]]) -> list[RunRow]:
    """One row per cell and factor; factors.py names its results 'FACTOR: FIGURE'."""
    return [
        RunRow(
            cell.labels | {"factor": factor},
            {name: [run[f"{factor}: {name}"] for run in seeds] for name in ("chance", *plots.READ)},
        )
        for cell, seeds in zip(cells, results, strict=True)
        for factor in FACTORS
    ]


def row_of_factor_means(cells: list[Cell], results: list[list[dict]]) -> list[RunRow]:
    """Means over groups of factors, since factors of one run are not independent: 'GROUP h - z' and 'GROUP z'."""
    rows = []
    for cell, seeds in zip(cells, results, strict=True):
        values = {}
        for group, factors in FACTOR_GROUPS.items():
            h, z = ([[run[f"{factor}: mlp {x}"] for factor in factors] for run in seeds] for x in "hz")
            values[f"{group} h - z"] = [
                fmean(a - b for a, b in zip(*run, strict=True)) for run in zip(h, z, strict=True)
            ]
            values[f"{group} z"] = [fmean(run) for run in z]
        rows.append(RunRow(cell.labels, values))
    return rows


@dataclass(frozen=True)
class Study:
    title: str
    cells: Callable[[PretrainSettings], list[Cell]]
    draw: Callable[[Figure, Sequence[RunRow]], None]
    claims: tuple[Claim, ...]
    measures: tuple[str, ...] = ("quality",)
    """Keys of cell.MEASURES."""
    figures: tuple[str, ...] = QUALITY
    """Columns of the table."""
    rows: Callable[[list[Cell], list[list[dict]]], list[RunRow]] = row_per_cell
    """Makes the rows of the table from the cells and their results, one dict per seed."""
    judged: Callable[[list[Cell], list[list[dict]]], list[RunRow]] | None = None
    """Like `rows`, for the rows that the claims are tested on, if these are not the table's."""


def heads(base: PretrainSettings) -> list[Cell]:
    shapes = [(head, d) for head in HEADS for d in (DIMENSIONS if HEADS[head] else DIMENSIONS[:1])]
    return [
        Cell(
            {"head": head, "dimension": d if HEADS[head] else "no head"},
            replace(base, head_layers=HEADS[head], head_dimension=d),
        )
        for head, d in shapes
    ]


def with_and_without_colour(base: PretrainSettings) -> list[Cell]:
    without = replace(base.augment, jitter=0.0, grey=0.0)
    return [Cell({"views": "all"}, base), Cell({"views": "no colour"}, replace(base, augment=without))]


def pairs(base: PretrainSettings) -> list[Cell]:
    cells = []
    for first, second in combinations_with_replacement(SINGLE, 2):
        changes = UNCHANGED | SINGLE[first] | SINGLE[second]
        changes["crop_area"] = changes["crop_area"] or base.augment.crop_area
        cells.append(Cell({"first": first, "second": second}, replace(base, augment=replace(base.augment, **changes))))
    return cells


def batches(base: PretrainSettings) -> list[Cell]:
    """Each length with the paper's loss; --epochs also with DCL, and with four views of half as many pictures.

    Half as many pictures in half as many epochs are as many steps, and as many views in each."""

    def cell(length: float, batch: int, **changes: Any) -> Cell:
        settings = replace(base, epochs=max(1, round(base.epochs * length)), batch_size=batch, **changes)
        return Cell(
            {
                "epochs": settings.epochs,
                "batch": batch,
                "views": settings.views,
                "loss": LOSS_NAMES[settings.loss],
                "length": length,
            },
            settings,
        )

    return [
        *(cell(length, batch) for length in LENGTHS for batch in BATCHES),
        *(cell(1, batch, loss="dcl") for batch in BATCHES),
        *(cell(0.5, batch // 2, views=4) for batch in BATCHES),
    ]


def temperatures(base: PretrainSettings) -> list[Cell]:
    return [Cell({"tau": tau}, replace(base, temperature=tau)) for tau in TEMPERATURES]


def strengths(base: PretrainSettings) -> list[Cell]:
    """No blur, except in the last cell, as in Table 1."""
    cells = []
    for strength in STRENGTHS:
        changes: dict[str, Any] = {"strength": strength, "blur": 0.0}
        changes |= {} if strength else {"jitter": 0.0, "grey": 0.0}
        cells.append(Cell({"strength": f"{strength:g}"}, replace(base, augment=replace(base.augment, **changes))))
    blurred = replace(base.augment, strength=1.0, blur=0.5)
    return [*cells, Cell({"strength": "1 + blur"}, replace(base, augment=blurred))]


def where(**labels: object) -> Callable[[dict], bool]:
    """A test whether a row has these labels; a tuple means any of its values."""
    allowed = {name: value if isinstance(value, tuple) else (value,) for name, value in labels.items()}
    return lambda row: all(row[name] in values for name, values in allowed.items())


def claim(words: str, more: dict, less: dict, figure: str = "linear h") -> Claim:
    return Claim(words, (SeedGroup(figure, where(**more)),), (SeedGroup(figure, where(**less)),))


def forgotten(words: str, group: str) -> Claim:
    return Claim(words, (SeedGroup(f"{group} h - z", where(views="all")),), ())


def h_over_z(head: str) -> Claim:
    return Claim(f"Behind a {head} head, h is better than z", (SeedGroup("linear h - z", where(head=head)),), ())


def of_batch(batch: int, length: float = 1, **labels: object) -> SeedGroup:
    return SeedGroup("linear h", where(**PAPER | {"batch": batch, "length": length} | labels))


CROP_COLOUR = {"first": "crop", "second": "colour"}

STUDIES = {
    "projection-head": Study(
        "The projection head g, and whether to use h or z (Fig. 8)",
        heads,
        plots.heads,
        (
            claim("A non-linear head is better for h than a linear one", {"head": "non-linear"}, {"head": "linear"}),
            claim("A linear head is better for h than none", {"head": "linear"}, {"head": "none"}),
            h_over_z("non-linear"),
            h_over_z("linear"),
        ),
        judged=rows_of_differences,
    ),
    "what-g-forgets": Study(
        "Which known factors z = g(h) loses (Table 3)",
        with_and_without_colour,
        plots.factors,
        (
            forgotten("An MLP reads colour (hue, saturation, value, made grey) better from h than from z", "colour"),
            forgotten("It reads orientation better from h than from z", "orientation"),
            forgotten("It reads scale and position better from h than from z", "scale and position"),
            forgotten("It reads the class better from h than from z", "class"),
            claim(
                "z keeps more colour if the views keep their colours",
                {"views": "no colour"},
                {"views": "all"},
                "colour z",
            ),
        ),
        measures=("factors",),
        figures=plots.READ,
        rows=row_per_factor,
        judged=row_of_factor_means,
    ),
    "augmentations": Study(
        "Augmentations alone and in pairs (Fig. 5; here on both views)",
        pairs,
        plots.pairs,
        (
            claim("Crop with colour is better than crop alone", CROP_COLOUR, {"first": "crop", "second": "crop"}),
            claim("Crop with colour is better than colour alone", CROP_COLOUR, {"first": "colour", "second": "colour"}),
            claim(
                "Crop with colour is better than crop with flip or blur",
                CROP_COLOUR,
                {"first": "crop", "second": ("flip", "blur")},
            ),
        ),
    ),
    "batch-size": Study(
        "Batch size and length of training (Fig. 9)",
        batches,
        plots.batches,
        (
            Claim(
                f"In the fewest epochs batch {LARGE} is better than {SMALL}",
                (of_batch(LARGE, SHORT),),
                (of_batch(SMALL, SHORT),),
            ),
            Claim(
                "That advantage shrinks with more epochs",
                (of_batch(LARGE, SHORT), of_batch(SMALL, LONG)),
                (of_batch(SMALL, SHORT), of_batch(LARGE, LONG)),
            ),
            claim("More epochs are better, whatever the batch", PAPER | {"length": LONG}, PAPER | {"length": SHORT}),
            Claim(
                f"In batches of {SMALL} DCL is better than NT-Xent", (of_batch(SMALL, loss="DCL"),), (of_batch(SMALL),)
            ),
            Claim(
                f"That advantage is smaller in batches of {LARGE}",
                (of_batch(SMALL, loss="DCL"), of_batch(LARGE)),
                (of_batch(SMALL), of_batch(LARGE, loss="DCL")),
            ),
            claim(
                "Four views of half as many pictures are better than two, with as many steps and views",
                {"views": 4},
                PAPER | {"length": 1},
            ),
        ),
        figures=(*QUALITY, "steps"),
    ),
    "temperature": Study(
        "Temperature (Table 5)",
        temperatures,
        plots.temperatures,
        (
            claim("tau 0.1 is better than 1", {"tau": 0.1}, {"tau": 1.0}),
            claim("tau 0.1 is better than 0.05", {"tau": 0.1}, {"tau": 0.05}),
            claim("tau 0.1 is better than 0.5", {"tau": 0.1}, {"tau": 0.5}),
        ),
    ),
    "colour": Study(
        "Strength of colour distortion (Table 1), and views that match by their histograms (Fig. 6)",
        strengths,
        plots.strengths,
        (
            claim(
                "Without colour distortion, histograms match views more often than at strength 1",
                {"strength": "0"},
                {"strength": "1"},
                "views matched by histogram",
            ),
            claim("Strength 1 is better than none", {"strength": "1"}, {"strength": "0"}),
            claim("Strength 1 is better than 1/8", {"strength": "1"}, {"strength": "0.125"}),
            claim("Blur adds to it", {"strength": "1 + blur"}, {"strength": "1"}),
        ),
        measures=("quality", "histograms"),
        figures=(*QUALITY, "views matched by histogram"),
    ),
}
