"""The studies of Chen et al. 2020 (arXiv:2002.05709): what changes from cell to cell, what is claimed, how it looks.

A cell is a run's settings beside the study's own base; a figure's row is a cell, once a seed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from statistics import fmean

from training.config import PretrainSettings
from training.study import plots
from training.study.cell import COMMIT
from training.study.factors import GREY, NAMES, NUMBERS
from training.study.verdict import Claim, RunRow, SeedGroup

HEADS = {"none": 0, "linear": 1, "non-linear": 2}
DIMENSIONS = (32, 128, 512)
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0)
BATCHES, LENGTHS = (32, 128, 512), (0.5, 1, 2)  # lengths over --epochs
STRENGTHS = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)
ONE_BY_ONE = {
    "crop": {"crop_area": None},  # the base's own
    "flip": {"flip": 0.5},
    "colour": {"jitter": 0.8, "strength": 1.0, "grey": 0.2},
    "blur": {"blur": 1.0},
}
NOTHING = {"crop_area": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
READ_OF = {
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


@dataclass(frozen=True)
class Study:
    title: str
    cells: Callable[[PretrainSettings], list[Cell]]
    measures: tuple[str, ...]
    """Keys of cell.MEASURES."""
    figures: tuple[str, ...]
    """Of the table."""
    claims: tuple[Claim, ...]
    draw: Callable
    """(figure, rows) -> None."""
    rows: Callable[[list[Cell], list[list[dict]]], list[RunRow]]
    """Cells, and what each gave once a seed, to the table's lines."""
    judged: Callable[[list[Cell], list[list[dict]]], list[RunRow]] | None = None
    """And to what the claims are about, where that is not the table: a value a run."""


def row_a_cell(cells: list[Cell], found: list[list[dict]]) -> list[RunRow]:
    return [
        RunRow(cell.labels, {name: [one[name] for one in seeds] for name in seeds[0] if name != COMMIT})
        for cell, seeds in zip(cells, found, strict=True)
    ]


def row_a_factor(cells: list[Cell], found: list[list[dict]]) -> list[RunRow]:
    """factors.py names a figure 'FACTOR: FIGURE'."""
    return [
        RunRow(
            cell.labels | {"factor": factor},
            {name: [one[f"{factor}: {name}"] for one in seeds] for name in ("chance", *plots.READ)},
        )
        for cell, seeds in zip(cells, found, strict=True)
        for factor in FACTORS
    ]


def row_a_run(cells: list[Cell], found: list[list[dict]]) -> list[RunRow]:
    """Means over factors: those of one run are not independent. 'WHAT h - z', and 'WHAT z'."""
    return [
        RunRow(
            cell.labels,
            {
                f"{what} {name}": [fmean(value(one, factor) for factor in factors) for one in seeds]
                for what, factors in READ_OF.items()
                for name, value in (
                    ("h - z", lambda one, factor: one[f"{factor}: mlp h"] - one[f"{factor}: mlp z"]),
                    ("z", lambda one, factor: one[f"{factor}: mlp z"]),
                )
            },
        )
        for cell, seeds in zip(cells, found, strict=True)
    ]


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
    for one, other in combinations_with_replacement(ONE_BY_ONE, 2):
        asked = NOTHING | ONE_BY_ONE[one] | ONE_BY_ONE[other]
        asked["crop_area"] = asked["crop_area"] or base.augment.crop_area
        cells.append(Cell({"first": one, "second": other}, replace(base, augment=replace(base.augment, **asked))))
    return cells


def batches(base: PretrainSettings) -> list[Cell]:
    return [
        Cell({"epochs": epochs, "batch": batch, "length": length}, replace(base, batch_size=batch, epochs=epochs))
        for length in LENGTHS
        for epochs in [max(1, round(base.epochs * length))]
        for batch in BATCHES
    ]


def temperatures(base: PretrainSettings) -> list[Cell]:
    return [Cell({"tau": tau}, replace(base, temperature=tau)) for tau in TEMPERATURES]


def strengths(base: PretrainSettings) -> list[Cell]:
    """Without blur, as in Table 1, whose last column adds it."""
    cells = []
    for strength in STRENGTHS:
        changes = {"strength": strength, "blur": 0.0} | ({} if strength else {"jitter": 0.0, "grey": 0.0})
        cells.append(Cell({"strength": f"{strength:g}"}, replace(base, augment=replace(base.augment, **changes))))
    blurred = replace(base.augment, strength=1.0, blur=0.5)
    return [*cells, Cell({"strength": "1 + blur"}, replace(base, augment=blurred))]


def where(**labels) -> Callable[[dict], bool]:
    """Rows whose labels are these; of several values, any."""
    of = {name: value if isinstance(value, tuple) else (value,) for name, value in labels.items()}
    return lambda row: all(row[name] in values for name, values in of.items())


def claim(words: str, figure: str, more: dict, less: dict) -> Claim:
    return Claim(words, (SeedGroup(figure, where(**more)),), (SeedGroup(figure, where(**less)),))


def h_over_z(words: str, **labels) -> Claim:
    return Claim(words, (SeedGroup("linear h", where(**labels)),), (SeedGroup("linear z", where(**labels)),))


def forgotten(words: str, what: str) -> Claim:
    return Claim(words, (SeedGroup(f"{what} h - z", where(views="all")),), ())


def gap(length: float) -> tuple[SeedGroup, SeedGroup]:
    return tuple(SeedGroup("linear h", where(batch=batch, length=length)) for batch in (BATCHES[-1], BATCHES[0]))


QUALITY = ("linear h", "linear z", "kNN h", "views matched z")

STUDIES = {
    "projection-head": Study(
        "The head g, and where to read (Fig. 8)",
        heads,
        ("quality",),
        QUALITY,
        (
            claim(
                "A non-linear head is better for h than a linear one",
                "linear h",
                *({"head": head} for head in ("non-linear", "linear")),
            ),
            claim("A linear head is better for h than none", "linear h", {"head": "linear"}, {"head": "none"}),
            h_over_z("Behind a non-linear head, h is better than z", head="non-linear"),
        ),
        plots.heads,
        row_a_cell,
    ),
    "what-g-forgets": Study(
        "What is lost in z = g(h), of factors that are known (Table 3)",
        with_and_without_colour,
        ("factors",),
        plots.READ,
        (
            forgotten("An MLP reads colour (hue, saturation, value, made grey) better from h than from z", "colour"),
            forgotten("It reads orientation better from h than from z", "orientation"),
            forgotten("It reads scale and position better from h than from z", "scale and position"),
            forgotten("It reads the class better from h than from z", "class"),
            claim(
                "z keeps more colour where views keep theirs",
                "colour z",
                *({"views": views} for views in ("no colour", "all")),
            ),
        ),
        plots.factors,
        row_a_factor,
        row_a_run,
    ),
    "augmentations": Study(
        "Augmentations alone and in pairs (Fig. 5; here on both views)",
        pairs,
        ("quality",),
        QUALITY,
        (
            claim(
                "Crop with colour is better than crop alone",
                "linear h",
                *({"first": "crop", "second": second} for second in ("colour", "crop")),
            ),
            claim(
                "Crop with colour is better than colour alone",
                "linear h",
                *({"first": first, "second": "colour"} for first in ("crop", "colour")),
            ),
            claim(
                "Crop with colour is better than crop with flip or blur",
                "linear h",
                *({"first": "crop", "second": second} for second in ("colour", ("flip", "blur"))),
            ),
        ),
        plots.pairs,
        row_a_cell,
    ),
    "batch-size": Study(
        "Batch size and length of training (Fig. 9)",
        batches,
        ("quality",),
        (*QUALITY, "steps"),
        (
            Claim(
                f"In the fewest epochs batch {BATCHES[-1]} is better than {BATCHES[0]}",
                *((group,) for group in gap(LENGTHS[0])),
            ),
            Claim(
                "That advantage shrinks with more epochs",
                (gap(LENGTHS[0])[0], gap(LENGTHS[-1])[1]),
                (gap(LENGTHS[0])[1], gap(LENGTHS[-1])[0]),
            ),
            claim(
                "More epochs are better, whatever the batch",
                "linear h",
                *({"length": length} for length in (LENGTHS[-1], LENGTHS[0])),
            ),
        ),
        plots.batches,
        row_a_cell,
    ),
    "temperature": Study(
        "Temperature (Table 5)",
        temperatures,
        ("quality",),
        QUALITY,
        (
            claim("tau 0.1 is better than 1", "linear h", {"tau": 0.1}, {"tau": 1.0}),
            claim("tau 0.1 is better than 0.05", "linear h", {"tau": 0.1}, {"tau": 0.05}),
            claim("tau 0.1 is better than 0.5", "linear h", {"tau": 0.1}, {"tau": 0.5}),
        ),
        plots.temperatures,
        row_a_cell,
    ),
    "colour": Study(
        "Strength of colour distortion (Table 1), and what histograms give away without it (Fig. 6)",
        strengths,
        ("quality", "histograms"),
        (*QUALITY, "views matched by histogram"),
        (
            claim(
                "Without colour distortion, histograms match views more often than at strength 1",
                "views matched by histogram",
                *({"strength": strength} for strength in ("0", "1")),
            ),
            claim("Strength 1 is better than none", "linear h", {"strength": "1"}, {"strength": "0"}),
            claim("Strength 1 is better than 1/8", "linear h", {"strength": "1"}, {"strength": "0.125"}),
            claim("Blur adds to it", "linear h", {"strength": "1 + blur"}, {"strength": "1"}),
        ),
        plots.strengths,
        row_a_cell,
    ),
}
