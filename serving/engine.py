"""The engine behind the routes: decoder, encoders, collections and views."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from export.artifact import BundleError, ModelCard, TooManyPixels
from serving.errors import NotReady
from serving.inference.decode import SMALL_BYTES, SMALL_PIXELS, Decoder, Upload
from serving.inference.served import ServedEncoder, ServedEncoders
from serving.library import Library
from serving.limits import Gate, Limits, cores
from serving.metrics import Metrics
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
        self._decode = Decoder(threads, limits.pixels)
        small_px = min(SMALL_PIXELS, limits.pixels)
        self._encoders = ServedEncoders(encoders, index, threads, small_px, metrics.record_run)
        self._gate = Gate(limits.images_at_once)
        self.library = Library(self._encoders, self._gate, self._embed, limits, threads)
        self.views = ViewAnalysis(self._encoders, self._gate, self._decode, self.library)
        metrics.levels = lambda: (self._gate.in_flight, self._encoders.waiting)

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

    def card_of(self, model: str | None) -> ModelCard:
        """Returns the model card of the encoder with this id, or of the default. Raises NotFound."""
        return self._encoders.get(model).card

    def refuse_when_full(self) -> None:
        """Raises Busy when no further image would be admitted."""
        self._gate.check()

    async def embed(self, uploads: list[Upload], model: str | None = None) -> EmbeddedImages:
        """Embed n >= 1 images with the encoder of this id, or with the default.

        Raises NotFound, Busy, Undecodable, TooLarge, and NotReady when the encoder cannot be restarted.
        """
        return await self._embed(uploads, self._encoders.get(model))

    def close(self) -> None:
        self.library.close()
        self._encoders.close()
        self._decode.close()

    async def _embed(self, uploads: list[Upload], encoder: ServedEncoder) -> EmbeddedImages:
        """Embed with this encoder, even if a newer one replaces it meanwhile."""
        with self._gate.admit(len(uploads)), _restart_failure_as_not_ready():
            encoded, decode_s = None, 0.0
            if encoder.decodes_small_images and all(len(upload.data) <= SMALL_BYTES for upload in uploads):
                with suppress(TooManyPixels):
                    encoded = await encoder.batch(uploads)  # decoded in the batch's process: a thread would cost more
                    decode_s = encoded.decode_s
            if encoded is None:
                started = perf_counter()
                pixels = await self._decode(uploads, encoder.card.preprocessing)
                decode_s = perf_counter() - started
                encoded = await encoder.batch(pixels)
        times = {"decode": decode_s, "queue": encoded.queue_s, "model": encoded.model_s}
        return EmbeddedImages(encoder.card.id, encoded.vectors, times, encoded.logits, encoder.card.classes)


@contextmanager
def _restart_failure_as_not_ready() -> Iterator[None]:
    """A lane that has to be restarted raises if its bundle on disk has been replaced by another."""
    try:
        yield
    except BundleError as error:
        raise NotReady(str(error)) from error
