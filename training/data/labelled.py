"""Which labelled pictures are learnt from and which are held out: by class, and the same ones for the same seed."""

import numpy as np

from training.data.sources import DataError


def few(labels: np.ndarray, classes: list[str], share: float, per_class: int | None, seed: int) -> np.ndarray:
    """Places of the labelled pictures that are kept, ascending. A larger share holds the smaller ones of its seed.

    labels     (N,) int64, index into `classes`; -1 where a picture has no label
    share      of each class, in (0, 1]
    per_class  so many of each class instead
    raises     DataError: a class that would be left without a picture, or has fewer than asked for
    """
    rng, kept = np.random.default_rng(seed), []
    for label in _present(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        take = int(share * len(rows) + 0.5) if per_class is None else per_class
        if take > len(rows):
            raise DataError(
                f"--labels-per-class {per_class}: class {classes[label]} has {_pictures(len(rows))}. Give "
                f"--labels-per-class {len(rows)} or fewer, or --label-share"
            )
        if take < 1:
            raise DataError(
                f"--label-share {share:g} leaves no picture of class {classes[label]}, which has "
                f"{_pictures(len(rows))}. Give --label-share {_up(0.5 / len(rows))} or more, or --labels-per-class 1"
            )
        kept.append(rows[:take])
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the labelled pictures that are kept, and of those held out: `share` of every class, at least one.

    A class's only picture is kept, so each class is among the kept.
    """
    rng, kept, held = np.random.default_rng(seed), [], []
    for label in _present(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        out = min(max(1, int(share * len(rows) + 0.5)), len(rows) - 1)
        held.append(rows[:out])
        kept.append(rows[out:])
    nothing = np.empty(0, np.int64)
    return np.sort(np.concatenate([nothing, *kept])), np.sort(np.concatenate([nothing, *held]))


def alone(labels: np.ndarray, classes: list[str]) -> list[str]:
    """Classes of a single picture."""
    return [classes[label] for label in _present(labels) if (labels == label).sum() == 1]


def check_classes(train: np.ndarray, test: np.ndarray | None, classes: list[str], data: str) -> None:
    """raises DataError: fewer than two classes to learn, or one that is asked about and never learnt."""
    known = _present(train)
    if len(known) < 2:
        what = f"only the class {classes[known[0]]}" if len(known) else "no labels"
        raise DataError(f"{data} has {what} in its split train: two classes or more are needed, a folder each")
    strange = [] if test is None else [classes[label] for label in np.setdiff1d(_present(test), known)]
    if strange:
        raise DataError(
            f"{data} has pictures of {_listed(strange)} in its split test and none of it in train: name the folders "
            "alike in both, or leave those out"
        )


def _present(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels[labels >= 0])


def _up(share: float) -> str:
    """To three digits, never less."""
    text = f"{share:.3g}"
    return text if float(text) >= share else f"{share * 1.01:.3g}"


def _pictures(n: int) -> str:
    return "1 picture" if n == 1 else f"{n:,} pictures"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
