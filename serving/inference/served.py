"""The encoders that are served, each replaced when another is put in its place."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from export.artifact import CARD, GRAPH, BundleError, ModelCard, load_bundle
from serving.collection.index import DEFAULT, Index, IndexProblem
from serving.errors import NotFound
from serving.inference.batcher import Batcher
from serving.inference.encoder import CPU, locate
from serving.inference.lane import open_lanes

log = logging.getLogger("twinview")

LOOK_EVERY_S = 1.0
KEPT_OPEN = 64  # collections, for each encoder


@dataclass(frozen=True)
class ServedEncoder:
    """An encoder with its batches, and the collections as it has embedded them."""

    card: ModelCard
    folder: Path
    """Its bundle's."""
    provider: str
    """ONNX Runtime's, that runs it."""
    batch: Batcher
    index: Callable[[str], Index]
    """The collection of a name; opens nothing yet."""

    @property
    def reads_files(self) -> bool:
        """Small ones, where its batches run."""
        return self.provider == CPU


@dataclass
class _Slot:
    """What serves for one of the names that were chosen."""

    chosen: str | None
    model: ServedEncoder
    stamp: tuple
    """Of the files that were last read for it, for better or worse."""
    seen: tuple | None = None
    """By the last look."""


class ServedEncoders:
    """A request takes one ServedEncoder and keeps it to its end, so that a replacement disturbs nobody: it stands beside the
    one that serves until it has shown that it works, and the old one goes with its last request."""

    def __init__(
        self,
        chosen: str | None,
        index: str | Path,
        threads: int,
        max_pixels: int,
        ran: Callable[[int, float], None] = lambda images, seconds: None,
    ):
        """Load all, and look after them from then on.

        chosen      what `locate` takes, or several of them with commas between; the first is the default
        index       where the collections are
        threads     of an encoder on the CPU
        max_pixels  of a file that is read where the batches run
        ran         is told of each run
        raises      BundleError
        """
        self._uri, self._cores, self._max_pixels, self._ran = index, threads, max_pixels, ran
        self._thread = ThreadPoolExecutor(1, "encoder")
        names = [name.strip() for name in (chosen or "").split(",") if name.strip()]
        self._places = [self._take(name) for name in names or [None]]
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="newer encoders", daemon=True).start()

    @property
    def default(self) -> ServedEncoder:
        return self._places[0].model

    @property
    def cards(self) -> list[ModelCard]:
        """The default first, each once."""
        return list({place.model.card.id: place.model.card for place in self._places}.values())

    @property
    def waiting(self) -> int:
        """Images that are in no batch yet."""
        return sum(place.model.batch.waiting for place in self._places)

    def named(self, id: str | None) -> ServedEncoder:
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
        for place in self._places:
            for lane in place.model.batch.lanes:
                lane.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, chosen: str | None) -> _Slot:
        folder = locate(chosen)
        stamp = _stamp(folder)
        return _Slot(chosen, self._load(folder), stamp)

    def _load(self, folder: Path) -> ServedEncoder:
        bundle = load_bundle(folder)
        card = bundle.card
        lanes, provider = open_lanes(bundle, self._cores, self._max_pixels, self._thread)
        facts = f"{card.preprocessing.size_px} px, {card.dimension} dimensions"
        log.info("loaded %s (%s; %s, batches at once: %d)", card.id, facts, provider, len(lanes))
        index = lru_cache(KEPT_OPEN)(partial(Index, self._uri, card.id, card.dimension))
        return ServedEncoder(card, folder, provider, Batcher(lanes, self._ran, dimension=card.dimension), index)

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            for place in self._places:
                try:
                    self._look(place)
                except Exception:  # whatever it is, the encoders that serve go on, and so does the looking
                    log.exception("looking for a newer encoder in place of %s failed", place.model.card.id)

    def _look(self, place: _Slot) -> None:
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
        index = model.index(DEFAULT)
        try:
            held = f"{index.count():,} pictures in {index.store.uri}"  # opens it, so that the first search need not
        except IndexProblem as error:
            held = str(error)
        log.info("serving %s in place of %s; %s", model.card.id, old, held)


def _stamp(folder: Path) -> tuple:
    """Another for other files. raises OSError where they are not."""
    facts = [(folder / name).stat() for name in (CARD, GRAPH)]
    return (folder, *((fact.st_ino, fact.st_mtime_ns, fact.st_size) for fact in facts))
