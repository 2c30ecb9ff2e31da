"""Which pictures to label: how much 30 picked labels say about the other pictures, compared with 30 random ones.

    python benchmarks/pick.py --data clothing.zip --encoder lite0

The training pictures are the pile to pick from. The test pictures are classified by the picked ones' labels: by the
nearest of them, and by logistic regression. The last rows have as many labels again: of random pictures, of `central`
ones, or of those whose two likeliest labels have the most similar probabilities, as finetune.py lists them.
`suggestions_right` is the share of right labels among the 300 surest that are suggested for the rest of the pile.
`picked_minus_random_points` is the gain of the default method in logistic regression, in percentage points, mean of the
seeds.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import dataclass
from statistics import mean

import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression

from benchmarks.result import publish
from benchmarks.vectors import with_interval, workplace
from serving.curation.pick import METHODS, pick
from serving.curation.suggest import suggest
from training.data.sources import open_source
from training.data.store import load_splits
from training.data.stream import StreamedRows
from training.evaluation.features import open_encoder

RANDOM, LEAST_SURE, LARGE = "random", "least sure", (100_000, 512)
SUREST = 300


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Pictures with labels in a training and a test split, as pretrain.py reads them."""
    encoder: str = "lite0"
    """Encoder, as evaluate.py takes it."""
    k: int = 30
    """Number of labels."""
    seeds: int = 10
    most: int = 10_000
    """Most training pictures; of the test pictures a quarter as many."""
    quick: bool = False
    """Shapes instead of the data, and three seeds."""


def main(options: Options) -> None:
    with workplace(options.data, options.quick) as data:
        h, labels, asked, expected = vectors(data, options.encoder, options.most)
    seeds = range(3 if options.quick else options.seeds)
    k = min(options.k, len(h) // 4)
    everything = np.zeros(len(h), bool)

    def chosen(method: str, labelled: np.ndarray, seed: int) -> np.ndarray:
        if method == RANDOM:
            return np.random.default_rng(seed).permutation(np.flatnonzero(~labelled))[:k]
        if method == LEAST_SURE:
            return least_sure(h, labels, labelled, k)
        return pick(h, k, method, labelled, seed)

    def row(name: str, picked: list[np.ndarray], compared: list[float], **more: object) -> tuple[dict, list[float]]:
        nearest = [float((labels[p][(asked @ h[p].T).argmax(axis=1)] == expected).mean()) for p in picked]
        linear = [classified(h[p], labels[p], asked, expected) for p in picked]
        gains = [a - b for a, b in zip(linear, compared or linear, strict=True)]
        classes = f"{mean(len(set(labels[p])) for p in picked):.1f} of {len(set(labels.tolist()))}"
        figures = {"nearest": with_interval(nearest), "linear": with_interval(linear)}
        return {"picked": name} | figures | {"gain, linear": with_interval(gains), "classes": classes} | more, linear

    rows, linear, picks = [], {}, {}
    for method in (RANDOM, *METHODS):
        started = time.perf_counter()
        picks[method] = [chosen(method, everything, seed) for seed in seeds]
        seconds = (time.perf_counter() - started) / len(seeds)
        found, linear[method] = row(method, picks[method], linear.get(RANDOM, []), seconds=seconds)
        rows.append(found)
    first, compared = picks["central"], []
    right = [right_suggestions(h, labels, picked) for picked in first]
    for method in (RANDOM, "central", LEAST_SURE):
        both = []
        for seed, picked in zip(seeds, first, strict=True):
            labelled = np.isin(np.arange(len(h)), picked)
            both.append(np.concatenate([picked, chosen(method, labelled, seed)]))
        found, of_both = row(f"central, then {method}", both, compared)
        compared = compared or of_both
        rows.append(found)
    gained = 100 * (mean(linear["central"]) - mean(linear[RANDOM]))
    figures = {"suggestions_right": mean(right), "picked_minus_random_points": gained}
    if not options.quick:
        figures = {f"seconds_{method}": large(method) for method in METHODS} | figures
    publish("pick", rows, figures)


def vectors(data: str, encoder: str, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns h of training pictures (n, d), their labels (n,), h of test pictures (m, d), their labels (m,); h is
    centred on the training pictures, rows of length 1."""
    extractor = open_encoder(encoder)
    found, labels, centre = [], [], None
    for split, count in zip(load_splits(open_source(data), extractor.preprocessing), (most, most // 4), strict=True):
        if split is None:
            raise SystemExit(f"error: {data} has no test split")
        rows = np.sort(np.random.default_rng(0).permutation(len(split))[:count])
        h = extractor(StreamedRows(split.pixels, rows)).numpy()
        centre = h.mean(axis=0) if centre is None else centre
        found.append((h - centre) / np.linalg.norm(h - centre, axis=1, keepdims=True))
        labels.append(np.array(split.labels)[rows])
    return found[0], labels[0], found[1], labels[1]


def classified(h: np.ndarray, labels: np.ndarray, asked: np.ndarray, expected: np.ndarray) -> float:
    """Returns the accuracy of logistic regression; of the only class, if there is no other."""
    if len(set(labels.tolist())) == 1:
        return float((expected == labels[0]).mean())
    return float(LogisticRegression(C=10, max_iter=1000).fit(h, labels).score(asked, expected))


def least_sure(h: np.ndarray, labels: np.ndarray, labelled: np.ndarray, k: int) -> np.ndarray:
    """Returns the k pictures without a label whose two likeliest labels have the most similar probabilities."""
    rest = np.flatnonzero(~labelled)
    model = LogisticRegression(C=10, max_iter=1000).fit(h[labelled], labels[labelled])
    best = np.sort(model.predict_proba(h[rest]), axis=1)
    return rest[np.argsort(best[:, -1] - best[:, -2], kind="stable")[:k]]


def right_suggestions(h: np.ndarray, labels: np.ndarray, picked: np.ndarray) -> float:
    """Returns the share of right labels among the SUREST that are suggested for the pictures that were not picked."""
    rest = np.setdiff1d(np.arange(len(h)), picked)
    suggested, share = suggest(h[rest], h[picked], labels[picked])
    surest = np.argsort(-share, kind="stable")[:SUREST]
    return float((suggested == labels[rest])[surest].mean())


def large(method: str) -> float:
    """Returns the seconds to pick 30 of 100,000 vectors of 512 numbers in 100 heaps."""
    rng = np.random.default_rng(0)
    n, d = LARGE
    h = rng.standard_normal((100, d), np.float32)[rng.integers(100, size=n)] + rng.standard_normal((n, d), np.float32)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    started = time.perf_counter()
    pick(h, 30, method)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
