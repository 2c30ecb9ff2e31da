"""Evaluate encoders on pictures, with or without labels.

    python training/evaluate.py runs/NAME resnet50 pixels --data ~/Pictures

With labels the queries are the test split and the bank is the training split (without a test split a fifth of every
class is held out as queries): kNN, linear evaluation and retrieval, each with a confidence interval over the queries.
With and without labels: alignment, uniformity, effective rank and near-duplicates. One row per encoder.

    OUT.json   the rows, the decays tried for linear evaluation, each class's accuracy, the nearest pairs
    OUT.png    with labels: confusion matrix and pictures right and wrong; without: pictures and their nearest
    OUT-sensitivity.png  with --sensitivity: how far h moves under each augmentation, compared with an untrained encoder

The card of an exported encoder gets what was measured, and the page says it next to the results of a search.
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

from export.artifact import CARD, record_measured
from export.paths import at_home, parse_settings
from training import zoo
from training.augment import AugmentSettings, augment
from training.config import RUNS
from training.data import store
from training.data.labelled import bank_and_queries, hold_out, single_picture_classes
from training.data.sources import DataError, Source, open_source
from training.data.store import PixelStore
from training.data.stream import StreamedRows
from training.evaluation import gallery, geometry, judge, linear, retrieval, sensitivity, words
from training.evaluation.bootstrap import interval
from training.evaluation.features import ENCODER_ERRORS, PIXELS, RANDOM, Extractor, open_encoder, size_note
from training.evaluation.gallery import Neighbours, Predictions
from training.evaluation.knn import default_k, knn_predict
from training.evaluation.table import aligned

HELD_OUT = 0.2  # share of each class: queries without a test split, and the part of the bank that chooses the decay
SAMPLE = 5000  # most pictures for measurements that compare all pairs or need augmented views
COPY = AugmentSettings(crop_area=(0.9, 1.0), flip=0.0, strength=0.1, grey=0.0, blur=0.0)
"""A slightly changed copy: up to a tenth cut off, colours shifted a little."""
PAIRS = 50  # most near-duplicates that are listed
TITLES = {
    "known": "bank pictures",
    "asked": "queries",
    "knn": "kNN accuracy",
    "linear": "linear accuracy",
    "decay": "weight decay",
    "near from cosine": "near-duplicate cosine",
    "found_again": "score of finding by a changed view",
    "found_first": "found first by a changed view",
    "judged": "of so many pictures",
    "knn over first": "kNN over first encoder",
    "linear over first": "linear over first encoder",
}
"""What the printed table calls some keys of the JSON file."""
SHARES = ("near-duplicates", "found_again", "found_first", "knn", "accuracy", "agreement")


@dataclass(frozen=True)
class EvaluateSettings:
    """Evaluate encoders on pictures, with or without labels: a table, a JSON file, a PNG."""

    encoders: tyro.conf.Positional[tuple[str, ...]]
    """One or more encoders: a run or checkpoint (RUN:random for the same encoder untrained), an exported bundle or
    .onnx file, an encoder that others trained (lite0, timm:NAME, torchvision:NAME, also with :FILE or :random), or
    pixels for the pictures themselves as a baseline."""
    data: str = "shapes"
    """Pictures, as in pretrain.py: a folder, a .zip, shards, hf:NAME, a torchvision name, or shapes."""
    k: int | None = None
    """Number of neighbours in kNN. By default 200, or a fiftieth of the labelled pictures if these are below 10,000."""
    temperature: float = 0.1
    """Temperature of kNN: a neighbour's vote has the weight exp(cosine / temperature)."""
    linear: Literal["lbfgs", "sgd", "none"] = "lbfgs"
    """Training of the linear classifier. lbfgs: to the optimum, with weight decay chosen on held-out pictures; sgd: the
    published recipe, but without crops and flips; none: no linear classifier."""
    retrieved: tuple[int, ...] = (1, 5, 10)
    """Values of k for precision@k and recall@k."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    """Augmentation of the two views that alignment compares; the same for all encoders."""
    sensitivity: bool = False
    """Also measure how far h moves under each augmentation, compared with an untrained encoder. This helps to choose
    augmentations."""
    size_px: int | None = None
    """Input size of torchvision's architectures (by default their own) and of pixels (by default 32)."""
    limit: int | None = None
    """For a trial: use at most this many pictures of each split."""
    seed: int = 0
    """Seed of the held-out pictures, the samples and the augmentation."""
    out: Path | None = None
    """Path of the result files, without .json or .png. By default runs/evaluation/DATA-ENCODER."""

    def __post_init__(self) -> None:
        if not self.encoders:
            raise ValueError("no encoder was given: give a run, a bundle, a torchvision architecture, or pixels")
        if not self.seed >= 0:
            raise ValueError(f"--seed must be at least 0, not {self.seed}")
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be above 0, not {self.temperature}")
        for name, values in (("k", (self.k,)), ("retrieved", self.retrieved), ("limit", (self.limit,))):
            if too_small := [value for value in values if value is not None and not value >= 1]:
                raise ValueError(f"--{name} must be at least 1, not {min(too_small)}")
        if self.size_px is not None and not self.size_px >= 8:
            raise ValueError(f"--size-px must be at least 8, not {self.size_px}")


@dataclass(frozen=True)
class PictureSet:
    """Pictures at the size of one encoder."""

    pixels: StreamedRows
    names: list[str]
    labels: np.ndarray  # (N,) int64, -1 without


@dataclass(frozen=True)
class Evaluation:
    """Results of one encoder."""

    row: dict
    """Measurements, with their confidence intervals."""
    detail: dict
    gallery: Predictions | Neighbours
    per_query: dict[str, np.ndarray] = field(default_factory=dict)
    """With labels: for each measurement its value per query, (Q,) float64."""
    sensitivities: list[sensitivity.Sensitivity] = field(default_factory=list)


def evaluate(settings: EvaluateSettings) -> dict:
    """Evaluate and write the results; returns the content of the JSON file.

    raises  DataError, ValueError, ENCODER_ERRORS
    """
    extractors = [open_encoder(name, settings.size_px) for name in settings.encoders]
    source = open_source(settings.data)
    labelled = has_usable_labels(source)
    results = [evaluate_encoder(extractor, source, labelled, settings) for extractor in extractors]
    if labelled:
        _compare_with_first(results)
    pixels = next((result.row for result in results if result.row["encoder"] == PIXELS), {})
    for result in results:
        result.row["verdict"] = verdict(result, [other for other in results if other is not result])
        _record(result.row, pixels, source.name)
    out = settings.out or RUNS / "evaluation" / f"{source.name}-{_file_stem(settings.encoders[0])}"
    return write_results(out, source.name, settings, results)


def verdict(result: Evaluation, others: list[Evaluation]) -> str:
    """What the measurements of an encoder say, in one sentence: compared with the others, or with chance."""
    row, measure = result.row, "knn" if "knn" in result.row else "found_first"
    what = "kNN accuracy" if measure == "knn" else "pictures found first by a changed view"
    sentences = []
    for other in others:
        shares = row[measure], other.row[measure]
        if measure == "knn":
            limits = interval(result.per_query["knn"] - other.per_query["knn"])
        else:
            limits = words.difference(shares[1], shares[0], row["judged"])
        sentences.append(words.compared(_called(row), _called(other.row), what, shares, limits))
    if not others:
        chance = row["largest class"] if measure == "knn" else 1 / row["judged"]
        guessing = "guessing the largest class" if measure == "knn" else "guessing"
        cases = row["asked"] if measure == "knn" else row["judged"]
        limits = words.difference(chance, row[measure], cases)
        sentences.append(words.compared(_called(row), guessing, what, (row[measure], chance), limits))
    return "; ".join(sentences)


def _called(row: dict) -> str:
    """The encoder's name without a path, since it is written into cards."""
    return "raw pixels" if row["encoder"] == PIXELS else _file_stem(row["encoder"])


def _record(row: dict, pixels: dict, data: str) -> None:
    """Write how good the vectors of an exported encoder are into its card.

    pixels  the row of raw pixels, if they were measured too
    """
    folder = Path(at_home(row["encoder"]))
    if (folder / CARD).exists():
        try:
            record_measured(folder, measured(row, pixels, data))
        except OSError as error:
            print(f"note: the card in {folder} cannot be changed, so the page will not say this ({error.strerror})")


def measured(row: dict, pixels: dict, data: str) -> dict:
    """What a card says of an evaluation: kNN with labels, otherwise pictures found by a changed view of them."""
    if "knn" in row:
        measure, chance = "knn", row["largest class"]
        figures = {"k": row["k"], "queries": row["asked"], "bank": row["known"]}
    else:
        measure, chance, figures = "found_first", 1 / row["judged"], {"judged": row["judged"]}
    figures |= {"pixels": pixels[measure]} if measure in pixels else {}
    return {"data": data, measure: row[measure], "chance": chance, **figures, "verdict": row["verdict"]}


def has_usable_labels(source: Source) -> bool:
    """Whether there are two classes or more, and labelled queries. Prints a note about labels that are not usable."""
    sizes = Counter(p.label for p in source.pictures if p.split == "train" and p.label is not None)
    tested = any(p.split == "test" and p.label is not None for p in source.pictures)
    labelled = len(sizes) > 1 and (tested or max(sizes.values()) > 1)
    if sizes and not labelled:
        why = (
            "each class has one picture"
            if len(sizes) > 1
            else f"{next(iter(sizes))} is the only class in the training split"
        )
        print(f"note: {why}, so the labels are not used")
    return labelled


def evaluate_encoder(extractor: Extractor, source: Source, labelled: bool, settings: EvaluateSettings) -> Evaluation:
    if note := size_note(extractor.name, extractor.preprocessing.size_px, source.pictures):
        print(f"note: {note}")
    train, test = store.load_splits(source, extractor.preprocessing)
    row, detail, per_query = {"encoder": extractor.name, "size_px": extractor.preprocessing.size_px}, {}, {}
    if labelled:
        pictures, queries, classes = labelled_sets(train, test, settings)
        h, h_queries = extractor(pictures.pixels, pictures.names), extractor(queries.pixels, queries.names)
        row |= {"dimension": h.shape[1], "known": len(h), "asked": len(h_queries)}
        figures, detail, per_query, predicted = with_labels(
            h, pictures.labels, h_queries, queries.labels, classes, settings
        )
        row |= figures | {"largest class": np.bincount(queries.labels).max().item() / len(queries.labels)}
        method, guess = list(predicted.items())[-1]
        title = f"{extractor.name}: {method} accuracy {row[method]:.1%}"
        examples = Predictions(title, queries.pixels, queries.labels, guess, classes)
    else:
        pictures = _picture_set(train, np.arange(len(train)), settings)
        h = extractor(pictures.pixels, pictures.names)
        row |= {"dimension": h.shape[1], "pictures": len(h)}
        examples = _nearest(f"{extractor.name}: nearest by the cosine of h", pictures, h, settings.seed)
    figures, pairs = without_labels(extractor, pictures, h, settings)
    moved = measure_sensitivity(extractor, pictures, settings) if settings.sensitivity else []
    return Evaluation(row | figures, detail | {"nearest pairs": pairs}, examples, per_query, moved)


def labelled_sets(
    train: PixelStore, test: PixelStore | None, settings: EvaluateSettings
) -> tuple[PictureSet, PictureSet, list[str]]:
    """The bank, the queries, and the classes that their labels are indices of. raises DataError"""
    bank_rows, query_store, query_rows = bank_and_queries(train, test, HELD_OUT, settings.seed, settings.data)
    if query_store is train and (single := single_picture_classes(train.labels, train.classes)):
        print(f"note: no queries of {', '.join(single[:5])}: the only picture of a class is not held out")
    bank, queries = _picture_set(train, bank_rows, settings), _picture_set(query_store, query_rows, settings)
    present = np.unique(bank.labels)
    number = np.full(len(train.classes) + 1, -1)  # new label of each old one; the last entry is for -1
    number[present] = np.arange(len(present))
    bank, queries = (PictureSet(part.pixels, part.names, number[part.labels]) for part in (bank, queries))
    if settings.limit and (queries.labels < 0).any():
        raise DataError(f"--limit {settings.limit} leaves classes of the queries out of the bank: give a larger one")
    return bank, queries, [train.classes[label] for label in present]


def with_labels(
    h_bank: Tensor,
    bank_labels: np.ndarray,
    h: Tensor,
    labels: np.ndarray,
    classes: list[str],
    settings: EvaluateSettings,
) -> tuple[dict, dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Measurements by kNN, linear evaluation and retrieval.

    bank_labels, labels  (M,), (Q,) int64, index into `classes`
    returns              the measurements with their intervals; details; each measurement's (Q,) float64 values; and
                         the predictions (Q,) int64 of kNN and linear evaluation
    raises               ValueError, DataError
    """
    known, expected = torch.from_numpy(bank_labels), torch.from_numpy(labels)
    k = settings.k or default_k(len(h_bank))
    if k > len(h_bank):
        raise ValueError(f"--k must be at most the bank's {len(h_bank)} pictures, not {k}")
    predicted = {"knn": knn_predict(h_bank, known, h, k, settings.temperature)}
    row, detail = {"k": k, "temperature": settings.temperature}, {}
    if settings.linear == "lbfgs":
        kept, held_out = (torch.from_numpy(part) for part in hold_out(bank_labels, HELD_OUT, settings.seed))
        if not len(held_out):
            raise DataError("each class has one picture in the bank: use --linear sgd or none, which hold nothing out")
        best, row["decay"], detail["decays"] = linear.sweep(h_bank, known, kept, held_out)
        predicted["linear"] = best.predict(h)
    elif settings.linear == "sgd":
        predicted["linear"] = linear.sgd(h_bank, known, settings.seed).predict(h)
    values = {name: (guess == expected).double() for name, guess in predicted.items()}
    ks = tuple(n for n in settings.retrieved if n <= len(h_bank))
    values |= retrieval.metrics(h, expected, h_bank, known, ks)
    for name, value in values.items():
        row |= {name: value.double().mean().item(), f"{name} interval": interval(value.numpy(), settings.seed)}
    last = list(predicted)[-1]
    detail["per class"] = {
        label: values[last][expected == i].mean().item() for i, label in enumerate(classes) if (expected == i).any()
    }
    guesses = {name: guess.numpy() for name, guess in predicted.items()}
    return row, detail, {name: value.double().numpy() for name, value in values.items()}, guesses


def without_labels(
    extractor: Extractor, pictures: PictureSet, h: Tensor, settings: EvaluateSettings
) -> tuple[dict, list[dict]]:
    """The measurements that need no labels, and the nearest pairs with their names. raises DataError"""
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(len(h))[:SAMPLE])
    if len(chosen) < 2:
        raise DataError(f"{settings.data} has one picture that can be read; two are needed to compare")
    centre = h.mean(dim=0)
    h, generator = h[torch.from_numpy(chosen)], torch.Generator().manual_seed(settings.seed)
    h_a, h_b, copy = (
        extractor(Views(pictures.pixels, chosen, augmentation, generator))
        for augmentation in (settings.augment, settings.augment, COPY)
    )
    duplicates = geometry.near_duplicates(h, copy, PAIRS)

    def encode_centred(pixels: np.ndarray) -> Tensor:
        return extractor.encode(pixels) - centre

    ranks = judge.ranks(encode_centred, pictures.pixels[chosen[: judge.PICTURES]])
    row = {
        "alignment": geometry.alignment(h_a, h_b),
        "uniformity": geometry.uniformity(h),
        "effective rank": geometry.effective_rank(h),
        "near-duplicates": duplicates.share,
        "near from cosine": duplicates.threshold,
        "found_again": (1 / ranks).mean().item(),
        "found_first": (ranks == 1).double().mean().item(),
        "judged": len(ranks),
    }
    names = [pictures.names[i] for i in chosen]
    return row, [{"a": names[i], "b": names[j], "cosine": round(c, 4)} for i, j, c in duplicates.pairs]


def measure_sensitivity(
    extractor: Extractor, pictures: PictureSet, settings: EvaluateSettings
) -> list[sensitivity.Sensitivity]:
    """Sensitivity of the encoder, and of its architecture with random weights if that is known."""
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(len(pictures.pixels))[: sensitivity.PICTURES])
    pixels = pictures.pixels[chosen]
    encoders = (extractor, sensitivity.untrained(extractor.name, settings.size_px))
    return [sensitivity.sensitivity(encoder, pixels, encoder.name, settings.seed) for encoder in encoders if encoder]


class Views:
    """Augmented pictures as uint8, the input of every encoder. Read them once, in order."""

    def __init__(
        self, pixels: StreamedRows, chosen: np.ndarray, augmentation: AugmentSettings, generator: torch.Generator
    ) -> None:
        self.pixels, self.chosen, self.augmentation, self.generator = pixels, chosen, augmentation, generator

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: slice) -> np.ndarray:
        pixels = torch.from_numpy(self.pixels[self.chosen[rows]])
        views = augment(pixels, self.augmentation, self.generator, pixels.shape[1])  # (n, 3, S, S)
        return (views.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


def _picture_set(pictures: PixelStore, rows: np.ndarray, settings: EvaluateSettings) -> PictureSet:
    if settings.limit:
        rows = np.sort(np.random.default_rng(settings.seed).permutation(rows)[: settings.limit])
    return PictureSet(StreamedRows(pictures.pixels, rows), [pictures.names[row] for row in rows], pictures.labels[rows])


def _nearest(title: str, pictures: PictureSet, h: Tensor, seed: int) -> Neighbours:
    queries = np.random.default_rng(seed).permutation(len(h))[: gallery.QUERIES]
    rows = []
    for query in queries.tolist():
        others = torch.cat([torch.arange(query), torch.arange(query + 1, len(h))])
        cosines, places = retrieval.nearest(h[query][None], h[others], min(gallery.NEIGHBOURS, len(others)))
        rows.append((query, others[places[0]].tolist(), cosines[0].tolist()))
    return Neighbours(title, pictures.pixels, rows)


def _compare_with_first(results: list[Evaluation]) -> None:
    """Add the difference of each encoder to the first on the same queries, with the interval of that difference."""
    for result in results[1:]:
        for name in ("knn", "linear"):
            if name in result.per_query:
                better = result.per_query[name] - results[0].per_query[name]
                result.row[f"{name} over first"] = better.mean().item()
                result.row[f"{name} over first interval"] = interval(better)


def write_results(out: Path, data: str, settings: EvaluateSettings, results: list[Evaluation]) -> dict:
    """Write OUT.json and the PNGs, print the table; returns the content of the JSON file."""
    rows = [result.row for result in results]
    details = {result.row["encoder"]: result.detail for result in results}
    sensitivities = [item for result in results for item in result.sensitivities]
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    content = {"settings": options, "data": data, "rows": rows, "details": details}
    if sensitivities:
        content["sensitivity"] = [item.to_dict() for item in sensitivities]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.json").write_text(json.dumps(content, indent=1))
    picture = out.with_name(f"{out.name}.png")
    if predictions := [result.gallery for result in results if isinstance(result.gallery, Predictions)]:
        gallery.write_predictions(picture, predictions)
    if neighbours := [result.gallery for result in results if isinstance(result.gallery, Neighbours)]:
        gallery.write_neighbours(picture, neighbours)
    print_table(rows)
    print(f"\nwritten to {out}.json and {out}.png")
    if sensitivities:
        picture = out.with_name(f"{out.name}-sensitivity.png")
        sensitivity.write(picture, sensitivities)
        print(f"\n{sensitivity.table(sensitivities)}\n\n{sensitivity.sentence(sensitivities[0])}\nwritten to {picture}")
    print(f"\n{rows[0]['verdict']}")
    return content


def print_table(rows: list[dict]) -> None:
    """One column per encoder, one line per measurement with its interval."""
    hidden = "verdict", "largest class"
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in hidden]
    names = [name for name in names if not name.endswith(" interval")]
    print("\n" + aligned([[TITLES.get(name, name), *(_cell(row, name) for row in rows)] for name in names]))


def _cell(row: dict, name: str) -> str:
    value, limits = row.get(name, ""), row.get(f"{name} interval")
    if limits and name.endswith(" over first") and not words.is_clear(limits):
        return "not distinguishable"
    if limits:
        return f"{value:.1%} ({limits[0]:.1%} to {limits[1]:.1%})"
    if name in SHARES and value != "":
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _file_stem(encoder: str) -> str:
    """The run's or the architecture's name; for an exported encoder the names of its run and its folder."""
    path = Path(encoder.removesuffix(RANDOM))
    if path.is_dir():
        parts = path.resolve().parts
        return "-".join(parts[-2:] if (path / CARD).exists() else parts[-1:])
    return zoo.short_name(str(path))


def main() -> None:
    try:
        evaluate(parse_settings(EvaluateSettings, description=__doc__.partition("\n\n")[0]))
    except (DataError, *ENCODER_ERRORS, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. Decoded pictures are kept.")
        sys.exit(130)


if __name__ == "__main__":
    main()
