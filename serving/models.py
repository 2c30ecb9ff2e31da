"""The encoders that are served, each replaced when another is put in its place."""

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from export.artifact import CARD, GRAPH, BundleError, ModelCard, Preprocessing, load_bundle
from serving.batcher import Batcher
from serving.decode import File
from serving.encoder import CPU, Encoder, locate
from serving.errors import NotFound
from serving.index import Index, IndexProblem

log = logging.getLogger("twinview")

LOOK_EVERY_S = 1.0

Encode = Callable[[np.ndarray], np.ndarray]
Read = Callable[[File, Preprocessing], np.ndarray]


@dataclass(frozen=True)
class Model:
    """An encoder with its batches, and the collection as it has embedded it."""

    encoder: Encoder
    batch: Batcher
    index: Index

    @property
    def card(self) -> ModelCard:
        return self.encoder.card


@dataclass
class _Place:
    """What serves for one of the names that were chosen."""

    chosen: str | None
    model: Model
    stamp: tuple
    """Of the files that were last read for it, for better or worse."""
    seen: tuple | None = None
    """By the last look."""


class Models:
    """A request takes one Model and keeps it to its end, so that a replacement disturbs nobody: it stands beside the
    one that serves until it has shown that it works, and the old one goes with its last request."""

    def __init__(
        self,
        chosen: str | None,
        index: Path,
        threads: int,
        read: Read,
        measured: Callable[[Encode], Encode] = lambda encode: encode,
    ):
        """Load all, and look after them from then on.

        chosen    what `locate` takes, or several of them with commas between; the first is the default
        index     folder of the collection
        threads   for the encoders; on the CPU each runs as many batches at once, on a GPU one
        read      a file as the encoder wants it
        measured  wraps what encodes a batch
        raises    BundleError
        """
        self._folder, self._lanes, self._read, self._measured = index, threads, read, measured
        self._threads = ThreadPoolExecutor(threads, "encoder")
        names = [name.strip() for name in (chosen or "").split(",") if name.strip()]
        self._places = [self._take(name) for name in names or [None]]
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="newer encoders", daemon=True).start()

    @property
    def default(self) -> Model:
        return self._places[0].model

    @property
    def cards(self) -> list[ModelCard]:
        """The default first, each once."""
        return list({place.model.card.id: place.model.card for place in self._places}.values())

    @property
    def waiting(self) -> int:
        """Images that are in no batch yet."""
        return sum(place.model.batch.waiting for place in self._places)

    def named(self, id: str | None) -> Model:
        """The default for None. raises NotFound."""
        if id is None:
            return self.default
        for place in self._places:
            if place.model.card.id == id:
                return place.model
        served = ", ".join(card.id for card in self.cards)
        raise NotFound(f"no encoder {id} is served here; there is {served}", "model")

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _take(self, chosen: str | None) -> _Place:
        folder = locate(chosen)
        stamp = _stamp(folder)
        return _Place(chosen, self._load(folder), stamp)

    def _load(self, folder: Path) -> Model:
        encoder = Encoder(load_bundle(folder), threads=1)  # two runs on a core each are faster than one on both
        card, provider = encoder.card, encoder.providers[0]
        lanes, read = 1, None
        if provider == CPU:
            lanes, read = self._lanes, partial(self._read, preprocessing=card.preprocessing)
        facts = f"{card.preprocessing.size_px} px, {card.dimension} dimensions; {provider}, batches at once: {lanes}"
        log.info("loaded %s (%s)", card.id, facts)
        batch = Batcher(self._measured(encoder), self._threads, lanes, read)
        return Model(encoder, batch, Index(self._folder, card.id, card.dimension))

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            for place in self._places:
                try:
                    self._look(place)
                except Exception:  # whatever it is, the encoders that serve go on, and so does the looking
                    log.exception("looking for a newer encoder in place of %s failed", place.model.card.id)

    def _look(self, place: _Place) -> None:
        """Take up what has taken the place of the files that were read, once two looks have found it the same: an
        export moves its files one after the other, and copying takes its time."""
        old = place.model.card.id
        try:
            folder = locate(place.chosen)
            stamp = _stamp(folder)
        except (BundleError, OSError):  # removed, or about to be replaced; what is in memory serves
            stamp = None
        settled, place.seen = stamp == place.seen, stamp
        if stamp is None or stamp == place.stamp or not settled:
            return
        place.stamp = stamp
        try:
            model = self._load(folder)
        except (BundleError, OSError) as error:
            log.warning("%s goes on serving; what stands in its place now is not fit to: %s", old, error)
            return
        place.model = model
        count = "no"
        with contextlib.suppress(IndexProblem):  # opens it, so that the first search need not
            count = f"{model.index.count():,}"
        log.info("serving %s in place of %s; %s pictures in %s", model.card.id, old, count, model.index.folder)


def _stamp(folder: Path) -> tuple:
    """Another for other files. raises OSError where they are not."""
    facts = [(folder / name).stat() for name in (CARD, GRAPH)]
    return (folder, *((fact.st_ino, fact.st_mtime_ns, fact.st_size) for fact in facts))
