"""Several sources trained on together, each with a weight: how often its pictures are taken in an epoch."""

import math
from collections import Counter
from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from training.data.sources import DataError, Source, open_source


class Store(Protocol):
    """A PixelStore or a Stream."""

    @property
    def pixels(self) -> Sized: ...
    @property
    def names(self) -> list[str]: ...


@dataclass(frozen=True)
class Mixture:
    """Weight of each source by the first part of its pictures' names; empty for a single source."""

    weights: dict[str, float]

    def images_per_epoch(self, store: Store) -> int:
        if not self.weights:
            return len(store.pixels)
        return sum(_taken(len(rows), weight) for rows, weight in self._parts(store))

    def order(self, store: Store, rng: np.random.Generator) -> np.ndarray:
        """The rows of an epoch in random order, (images_per_epoch,) int64.

        A picture that is taken several times comes once in each part of the epoch: twice in a batch, it would be its
        own negative.
        """
        if not self.weights:
            return rng.permutation(len(store.pixels))
        rows, places = [], []
        for of_source, weight in self._parts(store):
            for start in range(math.ceil(weight)):
                share = min(1.0, weight - start)
                some = rng.permutation(of_source)[: _taken(len(of_source), share)]
                rows.append(some)
                places.append((start + share * rng.random(len(some))) / weight)
        return np.concatenate(rows)[np.concatenate(places).argsort()]

    def _parts(self, store: Store) -> list[tuple[np.ndarray, float]]:
        """The rows of each source, and its weight."""
        prefixes = np.array([name.partition("/")[0] for name in store.names])
        return [(np.flatnonzero(prefixes == prefix), weight) for prefix, weight in self.weights.items()]


ALL_ONCE = Mixture({})
"""A single source, whose pictures are all taken once in an epoch."""


def _taken(pictures: int, weight: float) -> int:
    """Pictures that are taken in an epoch, at least one of a source that has some."""
    return max(min(1, pictures), math.floor(weight) * pictures + round((weight - math.floor(weight)) * pictures))


def open_mixture(data: str, also: tuple[str, ...]) -> tuple[Source, Mixture]:
    """One source of `data` and of each of `also`, DATA or DATA=WEIGHT. Names start with that of their source.

    raises  DataError
    """
    if not also:
        return open_source(data), ALL_ONCE
    given, named = [(data, 1.0), *map(_parse, also)], Counter()
    pictures, weights, said = [], {}, []
    for one, weight in given:
        source = open_source(one)
        named[source.name] += 1
        name = source.name if named[source.name] == 1 else f"{source.name}-{named[source.name]}"
        weights[name] = weight
        pictures += [replace(picture, name=f"{name}/{picture.name}") for picture in source.pictures]
        said += [f"{name}: {source.layout}"] if source.layout else []
    pictures.sort(key=lambda picture: picture.name)
    return Source("+".join(weights)[:80], pictures, "; ".join(said)), Mixture(weights)


def _parse(text: str) -> tuple[str, float]:
    data, equals, number = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0  # the name of a folder
    if not 0 < weight <= 100:
        raise DataError(f"--also {text}: the weight must be above 0 and at most 100, not {number}")
    return data, weight
