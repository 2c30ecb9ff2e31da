"""How many wrong labels `twinview odd --kind labels` finds, beside cleanlab on the same vectors.

    uv pip install cleanlab==2.9.0     to compare with it
    python benchmarks/label_errors.py --data clothing.zip --encoder lite0

3 % of the labels are replaced by other ones at random. A method sorts all pictures; wrong labels that the set has had
before count as false alarms. cleanlab gets probabilities of logistic regression, each of a model that has not seen the
picture. `recall_at_precision_80` is the share of the replaced labels that are found as long as at most one in five of
the listed pictures is a false alarm, mean of the seeds.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import mean

import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from threadpoolctl import threadpool_limits

from benchmarks.result import publish
from benchmarks.vectors import with_interval, workplace
from serving.collection.items import unit
from serving.curation.neighbours import neighbours
from serving.curation.odd import NEIGHBOURS, label_doubts
from training.data.sources import open_source
from training.data.store import load_splits
from training.data.stream import StreamedRows
from training.evaluation.features import open_encoder

SWAPPED = 0.03  # of the labels
PRECISION = 0.8
LARGE = (100_000, 512)


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Pictures with labels, as pretrain.py reads them."""
    encoder: str = "lite0"
    """Encoder, as evaluate.py takes it."""
    seeds: int = 10
    most: int = 10_000
    """Most pictures."""
    quick: bool = False
    """Shapes instead of the data, and three seeds."""


def main(options: Options) -> None:
    with workplace(options.data, options.quick) as data:
        h, labels = vectors(data, options.encoder, options.most)
    if not (beside_cleanlab := find_spec("cleanlab") is not None):
        print("cleanlab is left out because it is not installed: uv pip install cleanlab==2.9.0")
    found = {}
    for seed in range(3 if options.quick else options.seeds):
        given, wrong = swapped(labels, np.random.default_rng(seed))
        started = time.perf_counter()
        doubts = label_doubts(h, given)
        sorted_by = {"twinview odd": (doubts.score, doubts.suggested, time.perf_counter() - started)}
        sorted_by |= of_cleanlab(h, given) if beside_cleanlab else {}
        for name, (score, suggested, seconds) in sorted_by.items():
            one = {
                "recall": recall(score, wrong),
                "precision": float(wrong[np.argsort(-score, kind="stable")[: wrong.sum()]].mean()),
                "true label suggested": float((suggested == labels)[wrong].mean()),
                "seconds": seconds,
            }
            found.setdefault(name, []).append(one)
    rows = [
        {
            "sorted by": name,
            f"recall at precision {PRECISION:.0%}": with_interval([one["recall"] for one in results]),
            f"precision of the first {wrong.sum()}": with_interval([one["precision"] for one in results]),
            "true label suggested": with_interval([one["true label suggested"] for one in results]),
            "seconds": mean(one["seconds"] for one in results),
        }
        for name, results in found.items()
    ]
    figures = {"pictures": len(labels)} | ({} if options.quick else {"cpu_seconds_of_100000": large()})
    figures |= {"recall_at_precision_80": mean(one["recall"] for one in found["twinview odd"])}
    publish("label_errors", rows, figures)


def vectors(data: str, encoder: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns h of the labelled pictures (n, d), rows of length 1, and their labels (n,)."""
    extractor = open_encoder(encoder)
    found, labels = [], []
    for split in load_splits(open_source(data), extractor.preprocessing):
        if split is not None and len(rows := np.flatnonzero(np.array(split.labels) >= 0)):
            found.append(extractor(StreamedRows(split.pixels, rows)).numpy())
            labels.append(np.array(split.labels)[rows])
    if not found or len(set(np.concatenate(labels).tolist())) < 2:
        raise SystemExit(f"error: {data} has no two labels to swap")
    some = np.sort(np.random.default_rng(0).permutation(sum(map(len, labels)))[:most])
    return unit(np.concatenate(found)[some]), np.unique(np.concatenate(labels)[some], return_inverse=True)[1]


def swapped(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels (n,) of which some are replaced by any other one, and which are (n,) bool."""
    wrong = np.zeros(len(labels), bool)
    wrong[rng.permutation(len(labels))[: max(1, round(SWAPPED * len(labels)))]] = True
    count = int(labels.max()) + 1
    return np.where(wrong, (labels + rng.integers(1, count, len(labels))) % count, labels), wrong


def of_cleanlab(h: np.ndarray, given: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Returns score (n,), suggested labels (n,) and seconds of cleanlab's methods."""
    from cleanlab.rank import get_label_quality_scores

    started = time.perf_counter()
    model = LogisticRegression(C=10, max_iter=300)
    with threadpool_limits(1):  # small products: more threads take longer
        probabilities = cross_val_predict(model, h, given, method="predict_proba")  # (n, labels)
    seconds = time.perf_counter() - started
    scores = {
        f"cleanlab, {method}": -get_label_quality_scores(given, probabilities, method=method)
        for method in ("self_confidence", "normalized_margin")
    }
    return {name: (score, probabilities.argmax(axis=1), seconds) for name, score in scores.items()}


def recall(score: np.ndarray, wrong: np.ndarray) -> float:
    """Returns the largest share of the wrong labels among the first pictures of which PRECISION are wrong."""
    hits = wrong[np.argsort(-score, kind="stable")].cumsum()
    good = np.flatnonzero(hits / np.arange(1, len(hits) + 1) >= PRECISION)
    return float(hits[good[-1]] / wrong.sum()) if len(good) else 0.0


def large() -> float:
    """Returns the processor time, of all cores, to find the neighbours of 100,000 vectors of 512 numbers: nearly all of
    the work."""
    h = unit(np.random.default_rng(0).standard_normal(LARGE, np.float32))
    started = time.process_time()
    neighbours(h, NEIGHBOURS)
    return time.process_time() - started


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
