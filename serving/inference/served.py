"""The encoders that are served. Each is replaced while the service runs when a newer export takes its place.

A collection whose vectors the new default encoder has not computed yet, or not all of them, keeps the one before it: it
goes on answering, and both encoders are served until the new one has embedded every item of each collection.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

from export.artifact import CARD, GRAPH, BundleError, ModelCard, load_bundle
from serving.collection.index import DEFAULT, Index, IndexProblem, names
from serving.collection.names import names_of
from serving.collection.reembedding import Reembedding, is_complete
from serving.collection.store import FileStore
from serving.errors import NotFound
from serving.inference.batcher import Batcher
from serving.inference.device import open_lanes
from serving.inference.encoder import CPU, exports, locate
from serving.inference.health import Health
from serving.inference.text import TextEncoder

log = logging.getLogger("twinview")

CHECK_EVERY_S = 1.0
COUNT_EVERY_S = 5.0  # whether a collection has been completed
OPEN_COLLECTIONS = 64  # per encoder


@dataclass(frozen=True)
class ServedEncoder:
    """An encoder with its batches, and the collections that it has embedded."""

    card: ModelCard
    folder: Path
    """Folder of its bundle."""
    batch: Batcher
    index: Callable[[str], Index]
    """Returns the collection of this name; does not open it yet."""
    text: TextEncoder | None
    """Its text tower; None if it reads no text."""

    @cached_property
    def health(self) -> Health:
        return Health(self.batch, self.card.preprocessing.size_px)

    @property
    def provider(self) -> str:
        """ONNX Runtime's execution provider that runs it. After a failure of the GPU it is the CPU's."""
        return self.batch.lanes[0].provider

    @property
    def gpu_problem(self) -> str | None:
        """Why it runs on the CPU although there is a GPU."""
        return self.batch.lanes[0].gpu_problem

    @property
    def decodes_small_images(self) -> bool:
        """Whether `batch` accepts uploads."""
        return self.provider == CPU


@dataclass
class _Slot:
    """One of the configured names, and the encoder that it currently stands for."""

    name: str | None
    encoder: ServedEncoder
    stamp: tuple
    """Stamp of the files that were last loaded, successfully or not."""
    last_seen: tuple | None = None
    """Stamp at the last check."""


class ServedEncoders:
    """The encoders by id.

    A new encoder is loaded next to the old one and replaces it once it works. A request keeps the encoder it started
    with, so the old one is freed after its last request, and when no collection needs it any more.
    """

    def __init__(
        self,
        names: str | None,
        index: str | Path,
        threads: int,
        max_work: int,
        record_run: Callable[[int, float], None] = lambda images, seconds: None,
        gpu_required: bool = False,
    ):
        """Load all encoders, and check for newer ones from then on.

        names       one of `locate`'s names, or several separated by commas; the first is the default encoder
        index       folder of the collections, or s3://bucket/prefix
        threads     for each encoder on the CPU
        max_work    most work of an image that a lane decodes
        record_run  called after each run of an encoder, with its images and seconds
        gpu_required
                    whether encoders never run on the CPU
        raises      BundleError
        """
        self._gpu_required, self._store = gpu_required, FileStore(index)
        self._uri, self._cores, self._max_work, self._record_run = index, threads, max_work, record_run
        listed = [name.strip() for name in (names or "").split(",") if name.strip()]
        self._slots = [self._fill_slot(name) for name in listed or [None]]
        self._earlier: list[ServedEncoder] = []
        """Encoders that collections need beside the default one: former ones, the newest first, and configured ones."""
        self._kept: dict[str, ServedEncoder] = {}
        """By the name of a collection in paths, the one of them that it uses in place of the default encoder."""
        self._completed: set[tuple[str, str]] = set()
        """Collections and encoders, once they were complete. What others then still add with an older encoder does not
        bring that one back."""
        self._damaged: set[str] = set()
        """Problems that were logged."""
        if not listed:
            self._load_earlier_runs()
        elif len(listed) > 1:
            self._keep(self.default, [])
        self._closing, self._recount, self._back = threading.Event(), threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="newer encoders", daemon=True).start()

    @property
    def default(self) -> ServedEncoder:
        return self._slots[0].encoder

    @property
    def cards(self) -> list[ModelCard]:
        """Model cards without duplicates, the default first."""
        return list({encoder.card.id: encoder.card for encoder in self._all}.values())

    @property
    def gpu_problem(self) -> str | None:
        """Why an encoder runs on the CPU although there is a GPU."""
        return next((encoder.gpu_problem for encoder in self._all if encoder.gpu_problem), None)

    @property
    def waiting(self) -> int:
        """Number of images that are not in a batch yet."""
        return sum(encoder.batch.waiting for encoder in self._all)

    @property
    def _all(self) -> list[ServedEncoder]:
        encoders = [self.default, *self._earlier, *(slot.encoder for slot in self._slots[1:])]
        return list({id(encoder): encoder for encoder in encoders}.values())

    def get(self, id: str | None, collection: str = "") -> ServedEncoder:
        """Returns the encoder with this id; for None the default, or that of `collection`. Raises NotFound."""
        if id is None:
            _, stored = names_of(self._store, recent=True).resolve(collection)
            return self._kept.get(stored, self.default)
        for encoder in self._all:
            if encoder.card.id == id:
                return encoder
        raise NotFound(f"no encoder {id} is served here, only {', '.join(card.id for card in self.cards)}", "model")

    async def check(self) -> None:
        """Raises NotReady when one of the encoders does not answer."""
        for encoder in self._all:
            await encoder.health.check()

    def recount(self) -> None:
        """Look soon whether a new encoder has completed a collection."""
        self._recount.set()

    def look_back(self) -> None:
        """Look soon whether a collection needs an earlier encoder again."""
        self._back.set()

    def close(self) -> None:
        self._closing.set()
        for encoder in self._all:
            encoder.batch.close()
            if encoder.text:
                encoder.text.close()

    def _fill_slot(self, name: str | None) -> _Slot:
        folder = locate(name)
        stamp = _stamp(folder)
        return _Slot(name, self._load(folder), stamp)

    def _load(self, folder: Path) -> ServedEncoder:
        bundle = load_bundle(folder)
        card = bundle.card
        lanes = open_lanes(bundle, self._cores, self._max_work, self._gpu_required)
        facts = f"{card.preprocessing.size_px} px, {card.dimension} dimensions"
        log.info("loaded %s (%s; %s, batches at once: %d)", card.id, facts, lanes[0].provider, len(lanes))
        opened = lru_cache(OPEN_COLLECTIONS)(partial(Index, self._uri, card.id, card.dimension))

        def index(name: str) -> Index:
            return opened(*names_of(self._store, recent=True).resolve(name))

        batch = Batcher(lanes, self._record_run, dimension=card.dimension)
        return ServedEncoder(card, folder, batch, index, TextEncoder(bundle) if card.text else None)

    def _watch(self) -> None:
        counted = 0.0
        while not self._closing.wait(CHECK_EVERY_S):
            for slot in self._slots:
                try:
                    self._check(slot)
                except Exception:  # after any error the served encoders and this thread keep running
                    log.exception("the check for a newer encoder than %s failed", slot.encoder.card.id)
            if self._back.is_set():
                self._back.clear()
                try:
                    self._look_back()
                except Exception:
                    log.exception("the earlier encoders could not be looked for")
            due = self._recount.is_set() or time.monotonic() > counted + COUNT_EVERY_S
            if due and (self._earlier or self._slots[1:]):
                self._recount.clear()
                try:
                    self._keep(self.default, self._earlier)
                except Exception:
                    log.exception("the items of the collections could not be counted")
                counted = time.monotonic()

    def _check(self, slot: _Slot) -> None:
        """Load the files that have replaced those of the slot, once two checks have found the same files.

        An export moves its files one after the other, and a copy takes time.
        """
        old = slot.encoder.card.id
        try:
            folder = locate(slot.name)
            stamp = _stamp(folder)
        except (BundleError, OSError):  # deleted, or just being replaced; the loaded encoder stays in use
            folder, stamp = slot.encoder.folder, None
        settled, slot.last_seen = stamp == slot.last_seen, stamp
        if stamp is None or stamp == slot.stamp or not settled:
            return
        slot.stamp = stamp
        try:
            encoder = self._load(folder)
        except (BundleError, OSError) as error:
            log.warning("still serving %s, because the export that replaced it does not work: %s", old, error)
            return
        newest = encoder if slot is self._slots[0] else self.default
        self._keep(newest, [slot.encoder, *self._earlier])
        slot.encoder = encoder
        with suppress(IndexProblem):  # the collection may still have vectors of the earlier one only
            encoder.index(DEFAULT).count()  # opens it before the first search does
        log.info(f"serving {encoder.card.id} instead of {old}" if encoder.card.id != old else f"{old} has a new card")

    def _look_back(self) -> None:
        if self._slots[0].name is None:
            self._load_earlier_runs()
        else:
            self._keep(self.default, self._earlier)

    def _load_earlier_runs(self) -> None:
        """Load those exports under runs/ that collections need beside the newest one, the default."""
        bundles, earlier = {}, []
        for folder in exports()[1:]:
            try:
                bundle = load_bundle(folder)
                bundles.setdefault(bundle.card.id, bundle)
            except (BundleError, OSError) as error:
                log.warning("%s is not looked at: %s", folder, error)
        try:
            needed = self._needed([self.default.card, *(bundle.card for bundle in bundles.values())])
            for id in {card.id for card in needed.values()}:
                earlier.append(self._load(bundles[id].folder))
        except (IndexProblem, BundleError, OSError) as problem:
            log.warning("collections of earlier encoders are not served: %s", problem)
        self._keep(self.default, earlier)

    def _keep(self, newest: ServedEncoder, earlier: list[ServedEncoder]) -> None:
        """Make `newest` the default of those collections only that need none of `earlier`, the newest of them first,
        nor of the other configured ones."""
        others = [slot.encoder for slot in self._slots[1:]]
        encoders = {encoder.card.id: encoder for encoder in (newest, *earlier, *others)}
        try:
            needed = self._needed([encoder.card for encoder in encoders.values()])
        except IndexProblem as problem:  # the next check tries again
            log.warning("which encoders the collections need is not known: %s", problem)
            self._earlier = list(encoders.values())[1:]
            return
        before, self._kept = self._kept, {stored: encoders[card.id] for stored, card in needed.items()}
        shown = names_of(self._store, recent=True).shown
        ids = {card.id for card in needed.values()}
        self._earlier = [encoder for id, encoder in encoders.items() if id in ids]
        for stored in sorted(self._kept.keys() - before):
            old, new = needed[stored].id, newest.card.id
            log.info("the collection %s uses %s until %s is complete", shown(stored), old, new)
        for stored in sorted(before.keys() - self._kept):
            log.info("the collection %s uses %s from now on", shown(stored), newest.card.id)

    def _needed(self, cards: list[ModelCard]) -> dict[str, ModelCard]:
        """Returns the encoder that each collection uses, by its name in paths, if it is not the first of `cards`: the
        first that has embedded every item, or else the one that has embedded the most. Raises IndexProblem."""
        tables: dict[str, list[tuple[Index, ModelCard]]] = {}
        for card in cards:
            for name in names(self._uri, card.id):
                index = Index(self._uri, card.id, card.dimension, name)
                tables.setdefault(index.stored, []).append((index, card))
        best = {stored: self._best(several) for stored, several in tables.items()}
        return {stored: card for stored, card in best.items() if card.id != cards[0].id}

    def _best(self, tables: list[tuple[Index, ModelCard]]) -> ModelCard:
        """tables: of one collection, by encoder"""
        for index, card in tables:
            others = [other for other, _ in tables if other is not index]
            if self._is_complete(index, others):
                return card
        return max(tables, key=lambda entry: entry[0].count())[1]  # the first of equal ones

    def _is_complete(self, index: Index, others: list[Index]) -> bool:
        """Whether it is complete, or was once, and was not undone since. False if its files are damaged."""
        key = (index.stored, index.encoder_id)
        try:
            if key in self._completed and Reembedding(index).was_taken_back():
                self._completed.discard(key)
            if key not in self._completed and is_complete(index, others):
                self._completed.add(key)
        except IndexProblem as problem:
            if str(problem) not in self._damaged:
                log.warning("whether %s is complete is not known: %s", index.name, problem)
            self._damaged.add(str(problem))
        return key in self._completed


def _stamp(folder: Path) -> tuple:
    """Returns a value that changes with the bundle's files. Raises OSError when they do not exist."""
    files = [(folder / name).stat() for name in (CARD, GRAPH)]
    return (folder, *((file.st_ino, file.st_mtime_ns, file.st_size) for file in files))
