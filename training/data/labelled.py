"""Which labelled pictures are used, and which are held out: chosen within each class, the same ones for a seed."""

import numpy as np

from training.data.sources import DataError
from training.data.store import PixelStore


def choose_labelled(
    labels: np.ndarray, classes: list[str], share: float, per_class: int | None, seed: int
) -> np.ndarray:
    """Rows of the chosen labelled pictures, ascending. A larger share contains the smaller ones of the same seed.

    labels     (N,) int64, index into `classes`; -1 for a picture without label
    share      of each class, in (0, 1]
    per_class  how many of each class; overrides `share`
    raises     DataError: a class would be left without a picture, or has fewer than per_class
    """
    rng, chosen = np.random.default_rng(seed), []
    for label in _present(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = int(share * len(rows) + 0.5) if per_class is None else per_class
        if count > len(rows):
            raise DataError(
                f"--labels-per-class {per_class}: class {classes[label]} has {_pictures(len(rows))}. Give "
                f"--labels-per-class {len(rows)} or fewer, or --label-share"
            )
        if count < 1:
            raise DataError(
                f"--label-share {share:g} leaves no picture of class {classes[label]}, which has "
                f"{_pictures(len(rows))}. Give --label-share {_round_up(0.5 / len(rows))} or more, or "
                "--labels-per-class 1"
            )
        chosen.append(rows[:count])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the labelled pictures that are kept, and of those held out: `share` of every class, at least one.

    A class's only picture is kept, so each class is among the kept.
    """
    rng, nothing = np.random.default_rng(seed), np.empty(0, np.int64)
    kept, held_out = [nothing], [nothing]
    for label in _present(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, int(share * len(rows) + 0.5)), len(rows) - 1)
        held_out.append(rows[:count])
        kept.append(rows[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held_out))


def bank_and_queries(
    train: PixelStore, test: PixelStore | None, share: float, seed: int, data: str
) -> tuple[np.ndarray, PixelStore, np.ndarray]:
    """Rows of `train` whose labels are known; the store of the queries, and their rows in it.

    The queries are the labelled test pictures; without any, `share` of every class of `train` is held out.
    raises  DataError: fewer than two classes, queries of an unknown class, or no queries
    """
    tested = test is not None and (test.labels >= 0).any()
    check_classes(train.labels, test.labels if tested else None, train.classes, data)
    if tested:
        return np.flatnonzero(train.labels >= 0), test, np.flatnonzero(test.labels >= 0)
    kept, held_out = hold_out(train.labels, share, seed)
    if not len(held_out):
        raise DataError(f"{data}: each class has one picture, so none can be held out as a query")
    return kept, train, held_out


def single_picture_classes(labels: np.ndarray, classes: list[str]) -> list[str]:
    return [classes[label] for label in _present(labels) if (labels == label).sum() == 1]


def check_classes(train: np.ndarray, test: np.ndarray | None, classes: list[str], data: str) -> None:
    """raises DataError: fewer than two classes to train on, or a class that is in the test split only"""
    known = _present(train)
    if len(known) < 2:
        what = f"only the class {classes[known[0]]}" if len(known) else "no labels"
        raise DataError(f"{data} has {what} in its split train: two classes or more are needed, a folder each")
    missing = [] if test is None else [classes[label] for label in np.setdiff1d(_present(test), known)]
    if missing:
        raise DataError(
            f"{data} has pictures of {_listed(missing)} in its split test and none of it in train: give the folders "
            "the same names in both, or remove those classes from the test split"
        )


def _present(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels[labels >= 0])


def _round_up(share: float) -> str:
    """Rounded up to about three digits."""
    text = f"{share:.3g}"
    return text if float(text) >= share else f"{share * 1.01:.3g}"


def _pictures(n: int) -> str:
    return "1 picture" if n == 1 else f"{n:,} pictures"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
