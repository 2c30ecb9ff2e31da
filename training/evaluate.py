"""Judge encoders on pictures, with labels or without.

    python training/evaluate.py runs/NAME resnet50 pixels --data ~/Pictures

With labels, the test split is asked about and the training split is what is known (without a test split: a fifth of
every class is asked about): kNN, linear evaluation, retrieval, each with an interval over the pictures asked about.
With labels or without: alignment, uniformity, effective rank, near-duplicates. A row an encoder.

    OUT.json   the rows, the sweep of the linear evaluation, each class's accuracy, the nearest pairs
    OUT.png    with labels who is taken for whom, and pictures right and wrong; without, pictures and their nearest
    OUT-sensitivity.png  with --sensitivity: how far h moves under each augmentation, beside an untrained encoder
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from export.artifact import CARD
from training.augment import AugmentSettings, augment
from training.config import RUNS
from training.data import store
from training.data.labelled import alone, check_classes, hold_out
from training.data.sources import DataError, Source, open_source
from training.data.store import PixelStore
from training.data.stream import StreamedRows
from training.evaluation import gallery, geometry, linear, retrieval, sensitivity
from training.evaluation.bootstrap import interval
from training.evaluation.features import ENCODER_ERRORS, RANDOM, Extractor, open_encoder, size_note
from training.evaluation.gallery import Neighbours, Predictions
from training.evaluation.knn import default_k, knn_predict

HELD_OUT = 0.2  # of each class: asked about without a test split; and of what is known, to choose the linear decay
SAMPLE = 5000  # pictures, for what compares all with all or wants views
COPY = AugmentSettings(crop_area=(0.9, 1.0), flip=0.0, strength=0.1, grey=0.0, blur=0.0)
"""A slightly changed copy: cut by up to a tenth, colours shifted a little."""
PAIRS = 50  # near-duplicates listed


@dataclass(frozen=True)
class EvaluateSettings:
    """Judge encoders on pictures, with labels or without: a table, a JSON file, a PNG."""

    encoders: tyro.conf.Positional[tuple[str, ...]]
    """One or several: a run or a checkpoint (RUN:random: untrained), an exported bundle or .onnx file, an
    architecture of torchvision (resnet50, resnet50:IMAGENET1K_V1, resnet50:FILE.pth, resnet50:random), or pixels."""
    data: str = "shapes"
    """As of pretrain.py: a folder, a .zip, shards, a torchvision name, or shapes."""
    k: int | None = None
    """Neighbours that vote. By default 200, or a fiftieth of the known pictures where those are fewer than 10,000."""
    temperature: float = 0.1
    """Of the votes: exp(cosine / temperature)."""
    linear: Literal["lbfgs", "sgd", "none"] = "lbfgs"
    """lbfgs: to the optimum, decay chosen on a held-out part; sgd: the published recipe, on features without crops."""
    retrieved: tuple[int, ...] = (1, 5, 10)
    """The k of precision@k and recall@k."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    """Of the two views that alignment compares; the same for all encoders."""
    sensitivity: bool = False
    """Measure how far h moves under each augmentation too, beside an untrained encoder: to choose augmentations by."""
    size_px: int | None = None
    """For torchvision's architectures (by default their own) and pixels (by default 32)."""
    limit: int | None = None
    """At most so many pictures of each split, to try something out."""
    seed: int = 0
    """Of what is held out, sampled and drawn."""
    out: Path | None = None
    """Where .json and .png are written. By default runs/evaluation/DATA-ENCODER."""

    def __post_init__(self):
        if not self.encoders:
            raise ValueError("no encoder was named: give a run, a bundle, a torchvision architecture, or pixels")
        if not self.seed >= 0:
            raise ValueError(f"--seed must be at least 0, not {self.seed}")
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be above 0, not {self.temperature}")
        for name, values in (("k", (self.k,)), ("retrieved", self.retrieved), ("limit", (self.limit,))):
            if any(value is not None and not value >= 1 for value in values):
                raise ValueError(f"--{name} must be at least 1, not {min(values)}")
        if self.size_px is not None and not self.size_px >= 8:
            raise ValueError(f"--size-px must be at least 8, not {self.size_px}")


@dataclass(frozen=True)
class Set:
    """Pictures as one encoder sees them."""

    pixels: StreamedRows
    names: list[str]
    labels: np.ndarray  # (N,) int64, -1 without


def evaluate(settings: EvaluateSettings) -> dict:
    """Judge and write; returns what the JSON holds. Raises DataError, ValueError, ENCODER_ERRORS."""
    extractors = [open_encoder(name, settings.size_px) for name in settings.encoders]
    source = open_source(settings.data)
    sizes = Counter(p.label for p in source.pictures if p.split == "train" and p.label is not None)
    tested = any(p.split == "test" and p.label is not None for p in source.pictures)
    labelled = len(sizes) > 1 and (tested or max(sizes.values()) > 1)
    if sizes and not labelled:
        why = "each class has one picture" if len(sizes) > 1 else f"{next(iter(sizes))} is the only class to learn from"
        print(f"note: {why}, so these count as pictures without labels")
    rows, details, values, shown, moved = [], {}, [], [], []
    for extractor in extractors:
        if note := size_note(extractor.name, extractor.preprocessing.size_px, source.pictures):
            print(f"note: {note}")
        train, test = _stores(source, extractor)
        row, detail = {"encoder": extractor.name, "size_px": extractor.preprocessing.size_px}, {}
        if labelled:
            bank, queries, classes = with_labels(train, test, settings)
            h_bank, h = extractor(bank.pixels, bank.names), extractor(queries.pixels, queries.names)
            row |= {"dimension": h.shape[1], "known": len(h_bank), "asked": len(h)}
            judged = judge(h_bank, bank.labels, h, queries.labels, classes, settings)
            row, detail = row | judged.row, judged.detail
            values.append(judged.values)
            way, guess = list(judged.predicted.items())[-1]
            words = f"{extractor.name}: {way} accuracy {row[way]:.1%}"
            shown.append(Predictions(words, queries.pixels, queries.labels, guess, classes))
            pictures, h = bank, h_bank
        else:
            pictures = _sampled(train, np.arange(len(train)), settings)
            h = extractor(pictures.pixels, pictures.names)
            row |= {"dimension": h.shape[1], "pictures": len(h)}
        found, pairs = without_labels(extractor, pictures, h, settings)
        row |= found
        details[extractor.name] = detail | {"nearest pairs": pairs}
        rows.append(row)
        if settings.sensitivity:
            moved += how_far(extractor, pictures, settings)
        if not labelled:
            shown.append(_nearest(f"{extractor.name}: nearest by the cosine of h", pictures, h, settings.seed))
    if labelled:
        _against_first(rows, values)
    out = settings.out or RUNS / "evaluation" / f"{source.name}-{_short(settings.encoders[0])}"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"settings": _plain(asdict(settings)), "data": source.name, "rows": rows, "details": details}
    if moved:
        result["sensitivity"] = [found.to_dict() for found in moved]
    out.with_name(f"{out.name}.json").write_text(json.dumps(result, indent=1))
    (gallery.write_predictions if labelled else gallery.write_neighbours)(out.with_name(f"{out.name}.png"), shown)
    print_table(rows)
    print(f"\nwritten to {out}.json and {out}.png")
    if moved:
        picture = out.with_name(f"{out.name}-sensitivity.png")
        sensitivity.write(picture, moved)
        print(f"\n{sensitivity.table(moved)}\n\n{sensitivity.sentence(moved[0])}\nwritten to {picture}")
    return result


def with_labels(train: PixelStore, test: PixelStore | None, settings: EvaluateSettings) -> tuple[Set, Set, list[str]]:
    """What is known, what is asked about, and the classes of both. raises DataError."""
    tested = test is not None and (test.labels >= 0).any()
    check_classes(train.labels, test.labels if tested else None, train.classes, settings.data)
    if tested:
        bank = _sampled(train, np.flatnonzero(train.labels >= 0), settings)
        queries = _sampled(test, np.flatnonzero(test.labels >= 0), settings)
    else:
        if single := alone(train.labels, train.classes):
            print(f"note: asked about nothing of {', '.join(single[:5])}: a class of one picture can only be known")
        kept, held = hold_out(train.labels, HELD_OUT, settings.seed)
        if not len(held):
            raise DataError(f"{settings.data}: each class has one picture, so there is nothing to ask about")
        bank, queries = _sampled(train, kept, settings), _sampled(train, held, settings)
    present = np.unique(bank.labels)
    place = np.full(len(train.classes) + 1, -1)  # the last is -1's
    place[present] = np.arange(len(present))
    bank, queries = (Set(part.pixels, part.names, place[part.labels]) for part in (bank, queries))
    if settings.limit and (queries.labels < 0).any():
        raise DataError(f"--limit {settings.limit} leaves out classes that are asked about: give a larger one")
    return bank, queries, [train.classes[label] for label in present]


@dataclass(frozen=True)
class Judged:
    """What labels say of an encoder."""

    row: dict
    """The figures, each with its interval."""
    detail: dict
    predicted: dict[str, np.ndarray]
    """knn, linear: (Q,) int64."""
    values: dict[str, np.ndarray]
    """Of each query, (Q,) float64 each: what the figures are means of."""


def judge(
    h_bank: Tensor, bank_labels: np.ndarray, h: Tensor, labels: np.ndarray, classes: list[str], settings
) -> Judged:
    """bank_labels, labels (M,), (Q,) int64, index into `classes`. Raises ValueError, DataError."""
    known, asked = torch.from_numpy(bank_labels), torch.from_numpy(labels)
    k = settings.k or default_k(len(h_bank))
    if k > len(h_bank):
        raise ValueError(f"--k must be at most the {len(h_bank)} pictures that are known, not {k}")
    predicted = {"knn": knn_predict(h_bank, known, h, k, settings.temperature)}
    row, detail = {"k": k, "temperature": settings.temperature}, {}
    if settings.linear == "lbfgs":
        kept, held = (torch.from_numpy(part) for part in hold_out(bank_labels, HELD_OUT, settings.seed))
        if not len(held):
            raise DataError("each class has one picture that is known: --linear sgd and none hold nothing out")
        best, decay, accuracies = linear.sweep(h_bank, known, kept, held)
        predicted["linear"] = best.predict(h)
        row["decay"] = decay
        detail["decays"] = accuracies
    elif settings.linear == "sgd":
        predicted["linear"] = linear.sgd(h_bank, known, settings.seed).predict(h)
    values = {name: (guess == asked).double() for name, guess in predicted.items()}
    ks = tuple(n for n in settings.retrieved if n <= len(h_bank))
    values |= retrieval.figures(h, asked, h_bank, known, ks)
    for name, value in values.items():
        row |= {name: value.double().mean().item(), f"{name} interval": interval(value.numpy(), settings.seed)}
    last = list(predicted)[-1]
    detail["per class"] = {
        label: values[last][asked == i].mean().item() for i, label in enumerate(classes) if (asked == i).any()
    }
    guesses = {name: guess.numpy() for name, guess in predicted.items()}
    return Judged(row, detail, guesses, {name: value.double().numpy() for name, value in values.items()})


def without_labels(extractor: Extractor, pictures: Set, h: Tensor, settings) -> tuple[dict, list[dict]]:
    """A row's figures that want no labels, and the nearest pairs with their names."""
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(len(h))[:SAMPLE])
    if len(chosen) < 2:
        raise DataError(f"{settings.data} has one picture that can be read; to compare takes two")
    h, generator = h[torch.from_numpy(chosen)], torch.Generator().manual_seed(settings.seed)
    h_a, h_b, copy = (
        extractor(Views(pictures.pixels, chosen, how, generator)) for how in (settings.augment, settings.augment, COPY)
    )
    duplicates = geometry.near_duplicates(h, copy, PAIRS)
    row = {
        "alignment": geometry.alignment(h_a, h_b),
        "uniformity": geometry.uniformity(h),
        "effective rank": geometry.effective_rank(h),
        "near-duplicates": duplicates.share,
        "near from cosine": duplicates.threshold,
    }
    names = [pictures.names[i] for i in chosen]
    return row, [{"a": names[i], "b": names[j], "cosine": round(c, 4)} for i, j, c in duplicates.pairs]


def how_far(extractor: Extractor, pictures: Set, settings: EvaluateSettings) -> list[sensitivity.Sensitivity]:
    """Of the encoder, and of the same architecture untrained where that is known."""
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(len(pictures.pixels))[: sensitivity.PICTURES])
    pixels = pictures.pixels[chosen]
    beside = sensitivity.untrained(extractor.name, settings.size_px)
    return [
        sensitivity.sensitivity(one, pixels, one.name, settings.seed) for one in (extractor, beside) if one is not None
    ]


class Views:
    """Augmented pictures in uint8, which every encoder takes; asked for once, from the first to the last."""

    def __init__(self, pixels: StreamedRows, chosen: np.ndarray, how: AugmentSettings, generator: torch.Generator):
        self.pixels, self.chosen, self.how, self.generator = pixels, chosen, how, generator

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, some: slice) -> np.ndarray:
        pixels = torch.from_numpy(self.pixels[self.chosen[some]])
        views = augment(pixels, self.how, self.generator, pixels.shape[1])  # (n, 3, S, S)
        return (views.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


def _stores(source: Source, extractor: Extractor) -> tuple[PixelStore, PixelStore | None]:
    test = None
    train = store.load(source, extractor.preprocessing, "train")
    if any(picture.split == "test" for picture in source.pictures):
        test = store.load(source, extractor.preprocessing, "test")
    return train, test


def _sampled(of: PixelStore, rows: np.ndarray, settings: EvaluateSettings) -> Set:
    if settings.limit:
        rows = np.sort(np.random.default_rng(settings.seed).permutation(rows)[: settings.limit])
    return Set(StreamedRows(of.pixels, rows), [of.names[row] for row in rows], of.labels[rows])


def _nearest(title: str, pictures: Set, h: Tensor, seed: int) -> Neighbours:
    asked = np.random.default_rng(seed).permutation(len(h))[: gallery.QUERIES]
    rows = []
    for query in asked.tolist():
        others = torch.cat([torch.arange(query), torch.arange(query + 1, len(h))])
        cosines, places = retrieval.nearest(h[query][None], h[others], min(gallery.NEIGHBOURS, len(others)))
        rows.append((query, others[places[0]].tolist(), cosines[0].tolist()))
    return Neighbours(title, pictures.pixels, rows)


def _against_first(rows: list[dict], values: list[dict[str, np.ndarray]]) -> None:
    """By how much each encoder is better than the first on the same pictures: a difference's interval is narrower."""
    for row, own in zip(rows[1:], values[1:], strict=True):
        for name in ("knn", "linear"):
            if name in own:
                better = own[name] - values[0][name]
                row |= {f"{name} over first": better.mean().item(), f"{name} over first interval": interval(better)}


def print_table(rows: list[dict]) -> None:
    """A column an encoder, a line a figure: intervals stand behind their figures."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if not name.endswith(" interval")]
    table = [[name, *(_cell(row, name) for row in rows)] for name in names]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    print()
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _cell(row: dict, name: str) -> str:
    value, limits = row.get(name, ""), row.get(f"{name} interval")
    if limits:
        return f"{value:.1%} ({limits[0]:.1%} to {limits[1]:.1%})"
    if name == "near-duplicates":
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _short(encoder: str) -> str:
    """A run's name, or an architecture's; an exported encoder's is that of its run with its folder's."""
    path = Path(encoder.removesuffix(RANDOM))
    if path.is_dir():
        parts = path.resolve().parts
        return "-".join(parts[-2:] if (path / CARD).exists() else parts[-1:])
    return path.stem.partition(":")[0]


def _plain(value):
    """For JSON: paths as text."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in value.items()}


def main() -> None:
    try:
        evaluate(tyro.cli(EvaluateSettings, description=__doc__.partition("\n\n")[0]))
    except (DataError, *ENCODER_ERRORS, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. What was decoded is kept.")
        sys.exit(130)


if __name__ == "__main__":
    main()
