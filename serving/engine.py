"""The engine behind the routes: decoder, encoders, collections and views."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from export.artifact import ModelCard, TooManyPixels
from serving.comparisons import Comparisons
from serving.inference.batcher import Encoded
from serving.inference.decode import SMALL_WORK, Decoder, Upload, is_small
from serving.inference.lane import MAX_PROCESSES, LaneLost
from serving.inference.served import ServedEncoder, ServedEncoders
from serving.library import Library
from serving.limits import Gate, Limits, cores, gpu_required
from serving.metrics import Metrics
from serving.searches import Searches
from serving.views.analysis import ViewAnalysis


@dataclass(frozen=True)
class EmbeddedImages:
    """The embeddings of a request's images, and the encoder that made them."""

    model: str
    """Id of the encoder."""
    vectors: np.ndarray
    """h, float32 (n, d)."""
    times: dict[str, float]
    """Seconds in each stage: decode (including the wait for a thread), queue (the wait for a batch), model."""
    logits: np.ndarray
    """float32 (n, C)."""
    classes: list[str]
    """Names of the C classes; empty for an encoder that is no classifier."""


class Engine:
    def __init__(self, encoders: str | None, index: str | Path, limits: Limits, metrics: Metrics):
        """Load the encoders and warm them up.

        encoders  as ServedEncoders' `names`
        index     folder of the collections, or s3://bucket/prefix
        raises    BundleError
        """
        threads = limits.threads or cores()
        processes = min(threads, MAX_PROCESSES)
        self._decode = Decoder(processes, limits.pixels, limits.request_pixels, limits.pixels_at_once)
        small_px = min(SMALL_WORK, limits.pixels)
        self._encoders = ServedEncoders(encoders, index, threads, small_px, metrics.record_run, gpu_required())
        self._gate = Gate(limits.images_at_once)
        self.library = Library(self._encoders, self._gate, limits, self._decode)
        self.searches = Searches(self.library, self._encoders, self._gate, self._embed)
        self.comparisons = Comparisons(self.library)
        self.views = ViewAnalysis(self._encoders, self._gate, self._decode, self.library)
        metrics.drifts = self.library.drift.values
        metrics.levels = lambda: (self._gate.in_flight, self._encoders.waiting, self.gpu_problem is not None)

    @property
    def cards(self) -> list[ModelCard]:
        """Model cards of the encoders that are served, the default first."""
        return self._encoders.cards

    @property
    def card(self) -> ModelCard:
        """Model card of the default encoder."""
        return self._encoders.default.card

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's execution providers of the default encoder, the preferred first."""
        return [self._encoders.default.provider]

    @property
    def gpu_problem(self) -> str | None:
        """Why an encoder runs on the CPU although there is a GPU."""
        return self._encoders.gpu_problem

    def card_of(self, model: str | None) -> ModelCard:
        """Returns the model card of the encoder with this id, or of the default. Raises NotFound."""
        return self._encoders.get(model).card

    async def check(self) -> None:
        """Raises NotReady when an encoder does not answer."""
        await self._encoders.check()

    def refuse_when_full(self) -> None:
        """Raises Busy when no further image would be admitted."""
        self._gate.check()

    async def embed(self, uploads: list[Upload], model: str | None = None) -> EmbeddedImages:
        """Embed n >= 1 images with the encoder of this id, or with the default.

        Raises NotFound, Busy, Undecodable, TooLarge, and NotReady when an encoder or a decoder cannot be restarted.
        """
        encoder = self._encoders.get(model)
        embedded = await self._embed(uploads, encoder)
        self.library.note_pictures(encoder, embedded.vectors)
        return embedded

    async def embed_readable(self, uploads: list[Upload]) -> tuple[list[int], EmbeddedImages]:
        """Embed with the default encoder, leaving out images that cannot be decoded or have too many pixels.

        Returns the indices of the others, in order, and their embeddings; there may be none. Raises Busy, TooLarge when
        the images together have too many pixels, and NotReady as `embed`.
        """
        encoder = self._encoders.default
        with self._gate.admit(len(uploads)):
            started = perf_counter()
            pixels = await self._decode.readable(uploads, encoder.card.preprocessing)
            decode_s = perf_counter() - started
            kept = [i for i, one in enumerate(pixels) if one is not None]
            if not kept:
                return [], _no_images(encoder.card, decode_s)
            encoded = await encoder.batch(np.stack([one for one in pixels if one is not None]))
        self.library.note_pictures(encoder, encoded.vectors)
        return kept, _embedded(encoder.card, encoded, decode_s)

    def close(self) -> None:
        self.library.close()
        self._encoders.close()
        self._decode.close()

    async def _embed(self, uploads: list[Upload], encoder: ServedEncoder) -> EmbeddedImages:
        """Embed with this encoder, even if a newer one replaces it meanwhile."""
        with self._gate.admit(len(uploads)):
            encoded, decode_s = None, 0.0
            if encoder.decodes_small_images and all(is_small(upload.data) for upload in uploads):
                with suppress(TooManyPixels, LaneLost):
                    encoded = await encoder.batch(uploads)  # decoded in the batch's process: a thread would cost more
                    decode_s = encoded.decode_s
            if encoded is None:
                started = perf_counter()
                pixels = await self._decode(uploads, encoder.card.preprocessing)
                decode_s = perf_counter() - started
                encoded = await encoder.batch(pixels)
        return _embedded(encoder.card, encoded, decode_s)


def _embedded(card: ModelCard, encoded: Encoded, decode_s: float) -> EmbeddedImages:
    times = {"decode": decode_s, "queue": encoded.queue_s, "model": encoded.model_s}
    return EmbeddedImages(card.id, encoded.vectors, times, encoded.logits, card.classes)


def _no_images(card: ModelCard, decode_s: float) -> EmbeddedImages:
    vectors, logits = (np.zeros((0, width), np.float32) for width in (card.dimension, len(card.classes)))
    return EmbeddedImages(card.id, vectors, {"decode": decode_s}, logits, card.classes)
