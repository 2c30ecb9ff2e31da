"""What a search by a new encoder finds while it has embedded only a few pictures, by serving/collection/upgrade.py.

    python benchmarks/upgrade.py --data cifar10-train.zip --old runs/lite0-64/encoder --new runs/lite0-96/encoder

`neighbours` is recall@10: the share of the ten nearest by the new encoder that are found. `classes` is the share of the
ten found that have the query's class, divided by that of full re-embedding, as Drift-Adapter (Vejendla 2025,
arXiv:2509.23471) divides recalls. Each map is learnt from a part of the collection; no picture counts as embedded again
but where the table says so. `recall_kept` and `classes_kept` are these shares for the map that is used, learnt from the
largest number of pairs.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.result import publish
from benchmarks.vectors import workplace
from export.artifact import preprocess, read_image
from export.paths import local_path
from serving.collection.items import unit
from serving.collection.vector_map import VectorMap
from training.data import shapes
from training.data.sources import SourcePicture, open_source
from training.evaluation.features import Extractor, open_encoder

K, QUERIES, DECODED = 10, 500, 64
RANK, HIDDEN, EPOCHS = 64, 256, 60
EMBEDDED = (0.1, 0.5, 0.9)  # shares of the collection that are embedded again
QUICK_OLD, QUICK_NEW, QUICK_PX, QUICK_PICTURES, QUICK_PAIRS = "pixels", "resnet18:random", 32, 1_000, 200


@dataclass(frozen=True)
class Options:
    data: str = "shapes"
    """Pictures with classes, as pretrain.py reads them."""
    old: str = "lite0"
    """Encoder, as evaluate.py takes it."""
    new: str = "lite0"
    most: int = 100_000
    """Most pictures."""
    pairs: tuple[int, ...] = (300, 1000)
    """Numbers of pictures that both encoders have embedded."""
    quick: bool = False
    """Shapes instead of the data; pixels, and an untrained encoder."""


@dataclass(frozen=True)
class Trial:
    old: np.ndarray
    """(n, d_old), the collection"""
    new: np.ndarray
    """(n, d_new)"""
    old_queries: np.ndarray
    """(QUERIES, d_old)"""
    queries: np.ndarray
    """(QUERIES, d_new)"""
    same: np.ndarray
    """(QUERIES, n) bool: of the same class"""

    def row(self, method: str, cosines: np.ndarray) -> dict:
        """cosines  (QUERIES, n)"""
        found, nearest = _top(cosines), _top(self.queries @ self.new.T)
        neighbours = np.mean([len(set(ours) & set(best)) / K for ours, best in zip(found, nearest, strict=True)])
        share, best = (np.take_along_axis(self.same, rows, axis=1).mean() for rows in (found, nearest))
        return {"method": method, "neighbours": float(neighbours), "classes": float(share / best)}


def main(options: Options) -> None:
    trial = encoded(options)
    pairs = (QUICK_PAIRS,) if options.quick else options.pairs
    rows = [{"pairs": 0} | trial.row("queries by the old encoder", trial.old_queries @ trial.old.T)]
    kept: dict = {}
    for count in pairs:
        chosen = np.random.default_rng(0).permutation(len(trial.old))[:count]
        if len(chosen) < count:
            raise SystemExit(
                f"error: {options.data} has {len(trial.old):,} pictures beside the queries, and not {count:,}"
            )
        rows += [{"pairs": count} | trial.row(name, cosines) for name, cosines in mapped(trial, chosen)]
        kept = rows[-1]
        rows += [{"pairs": count} | row for row in merged(trial, chosen)]
    figures = {"pictures": len(trial.old), "pairs": kept["pairs"]}
    publish("upgrade", rows, figures | {"classes_kept": kept["classes"], "recall_kept": kept["neighbours"]})


def encoded(options: Options) -> Trial:
    with workplace(options.data, options.quick) as data:
        old, new = (
            str(path.resolve()) if (path := local_path(name)).exists() else name for name in (options.old, options.new)
        )
        if options.quick:
            data, old, new = "many", QUICK_OLD, QUICK_NEW
            shapes.make(Path(data), train=QUICK_PICTURES, test=1, size_px=QUICK_PX)
        pictures = open_source(data).pictures
        chosen = [pictures[row] for row in np.random.default_rng(0).permutation(len(pictures))[: options.most]]
        first = open_encoder(old, QUICK_PX if options.quick else None)
        second = open_encoder(new, QUICK_PX if options.quick else None)
        x, y = (unit(np.concatenate(list(h(extractor, chosen)))) for extractor in (first, second))
    labels = np.array([str(picture.label) for picture in chosen])
    same = labels[:QUERIES, None] == labels[None, QUERIES:]
    return Trial(x[QUERIES:], y[QUERIES:], x[:QUERIES], y[:QUERIES], same)


def h(extractor: Extractor, pictures: list[SourcePicture]) -> Iterator[np.ndarray]:
    for at in range(0, len(pictures), DECODED):
        part = [preprocess(read_image(one.read()), extractor.preprocessing) for one in pictures[at : at + DECODED]]
        yield extractor.encode(np.stack(part)).numpy()


def mapped(trial: Trial, chosen: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and cosines (QUERIES, n), the map that is used last."""
    x, y = trial.old[chosen], trial.new[chosen]
    yield "queries to old, Procrustes", unit(procrustes(y, x)(trial.queries)) @ trial.old.T
    yield "queries to old, ridge", VectorMap.learn(y, x)(trial.queries) @ trial.old.T
    ridge = VectorMap.learn(x, y)
    _, _, basis = np.linalg.svd(x @ ridge.matrix - (x @ ridge.matrix).mean(axis=0), full_matrices=False)
    projection = basis[:RANK].T @ basis[:RANK]
    low = VectorMap(ridge.matrix @ projection, y.mean(axis=0) - x.mean(axis=0) @ ridge.matrix @ projection)
    yield "old to new, Procrustes", trial.queries @ unit(procrustes(x, y)(trial.old)).T
    yield f"old to new, ridge of rank {RANK}", trial.queries @ low(trial.old).T
    yield "old to new, ridge and residual MLP", trial.queries @ unit(residual(x, y, ridge)(trial.old)).T
    yield "old to new, ridge (used)", trial.queries @ ridge(trial.old).T


def merged(trial: Trial, chosen: np.ndarray) -> Iterator[dict]:
    """Yields rows for larger parts of the collection that are embedded again; the map is the one of these pairs."""
    learnt = VectorMap.learn(trial.old[chosen], trial.new[chosen])
    estimated, real = trial.queries @ learnt(trial.old).T, trial.queries @ trial.new.T
    for share in EMBEDDED:
        done = np.random.default_rng(1).random(len(trial.new)) < share
        for name, other in [
            ("only the new table", np.full_like(real, -1)),
            ("both, uncorrected cosines", estimated),
            ("both (used)", learnt.cosines(estimated)),
        ]:
            yield trial.row(f"{share:.0%} embedded: {name}", np.where(done, real, other))


def procrustes(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The orthogonal map of centred vectors (Schönemann 1966, doi:10.1007/BF02289451)."""
    u, _, v = np.linalg.svd((x - x.mean(axis=0)).T @ (y - y.mean(axis=0)), full_matrices=False)
    return lambda more: (more - x.mean(axis=0)) @ u @ v + y.mean(axis=0)


def residual(x: np.ndarray, y: np.ndarray, ridge: VectorMap) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression, and a perceptron for what it leaves; its epoch is chosen on a fifth of the pairs."""
    torch.manual_seed(0)
    scale, held = x.shape[1] ** 0.5, len(x) // 5
    network = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, y.shape[1])
    )
    for weights in network[2].parameters():
        torch.nn.init.zeros_(weights)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    inputs, left = torch.from_numpy(x * scale), torch.from_numpy(y - x @ ridge.matrix - ridge.offset)
    best = (float("inf"), {})
    for _ in range(EPOCHS):
        for rows in (held + torch.randperm(len(x) - held)).split(128):
            optimizer.zero_grad()
            (network(inputs[rows]) - left[rows]).square().sum(dim=1).mean().backward()
            optimizer.step()
        with torch.no_grad():
            loss = (network(inputs[:held]) - left[:held]).square().sum(dim=1).mean().item()
        if loss < best[0]:
            best = (loss, {name: value.clone() for name, value in network.state_dict().items()})
    network.load_state_dict(best[1])

    @torch.no_grad()
    def estimate(more: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(more * scale)).numpy() + more @ ridge.matrix + ridge.offset

    return estimate


def _top(cosines: np.ndarray) -> np.ndarray:
    return np.argpartition(-cosines, K, axis=1)[:, :K]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
