"""The encoders that are served. Each is replaced while the service runs when a newer export takes its place."""

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

CHECK_EVERY_S = 1.0
OPEN_COLLECTIONS = 64  # per encoder


@dataclass(frozen=True)
class ServedEncoder:
    """An encoder with its batches, and the collections that it has embedded."""

    card: ModelCard
    folder: Path
    """Folder of its bundle."""
    provider: str
    """ONNX Runtime's execution provider that runs it."""
    batch: Batcher
    index: Callable[[str], Index]
    """Returns the collection of this name; does not open it yet."""

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
    with, so the old one is freed after its last request.
    """

    def __init__(
        self,
        names: str | None,
        index: str | Path,
        threads: int,
        max_pixels: int,
        record_run: Callable[[int, float], None] = lambda images, seconds: None,
    ):
        """Load all encoders, and check for newer ones from then on.

        names       one of `locate`'s names, or several separated by commas; the first is the default encoder
        index       folder of the collections, or s3://bucket/prefix
        threads     for each encoder on the CPU
        max_pixels  largest image that a lane decodes
        record_run  called after each run of an encoder, with its images and seconds
        raises      BundleError
        """
        self._uri, self._cores, self._max_pixels, self._record_run = index, threads, max_pixels, record_run
        self._thread = ThreadPoolExecutor(1, "encoder")
        listed = [name.strip() for name in (names or "").split(",") if name.strip()]
        self._slots = [self._fill_slot(name) for name in listed or [None]]
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="newer encoders", daemon=True).start()

    @property
    def default(self) -> ServedEncoder:
        return self._slots[0].encoder

    @property
    def cards(self) -> list[ModelCard]:
        """Model cards without duplicates, the default first."""
        return list({slot.encoder.card.id: slot.encoder.card for slot in self._slots}.values())

    @property
    def waiting(self) -> int:
        """Number of images that are not in a batch yet."""
        return sum(slot.encoder.batch.waiting for slot in self._slots)

    def get(self, id: str | None) -> ServedEncoder:
        """Returns the encoder with this id; the default for None. Raises NotFound."""
        if id is None:
            return self.default
        for slot in self._slots:
            if slot.encoder.card.id == id:
                return slot.encoder
        raise NotFound(f"no encoder {id} is served here, only {', '.join(card.id for card in self.cards)}", "model")

    def close(self) -> None:
        self._closing.set()
        for slot in self._slots:
            for lane in slot.encoder.batch.lanes:
                lane.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _fill_slot(self, name: str | None) -> _Slot:
        folder = locate(name)
        stamp = _stamp(folder)
        return _Slot(name, self._load(folder), stamp)

    def _load(self, folder: Path) -> ServedEncoder:
        bundle = load_bundle(folder)
        card = bundle.card
        lanes, provider = open_lanes(bundle, self._cores, self._max_pixels, self._thread)
        facts = f"{card.preprocessing.size_px} px, {card.dimension} dimensions"
        log.info("loaded %s (%s; %s, batches at once: %d)", card.id, facts, provider, len(lanes))
        index = lru_cache(OPEN_COLLECTIONS)(partial(Index, self._uri, card.id, card.dimension))
        return ServedEncoder(card, folder, provider, Batcher(lanes, self._record_run, dimension=card.dimension), index)

    def _watch(self) -> None:
        while not self._closing.wait(CHECK_EVERY_S):
            for slot in self._slots:
                try:
                    self._check(slot)
                except Exception:  # after any error the served encoders and this thread keep running
                    log.exception("the check for a newer encoder than %s failed", slot.encoder.card.id)

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
        slot.encoder = encoder
        index = encoder.index(DEFAULT)
        try:
            contents = f"{index.count():,} pictures in {index.store.uri}"  # opens it before the first search does
        except IndexProblem as error:
            contents = str(error)
        log.info("serving %s instead of %s; %s", encoder.card.id, old, contents)


def _stamp(folder: Path) -> tuple:
    """Returns a value that changes with the bundle's files. Raises OSError when they do not exist."""
    files = [(folder / name).stat() for name in (CARD, GRAPH)]
    return (folder, *((file.st_ino, file.st_mtime_ns, file.st_size) for file in files))
