"""What answers the requests: decoder, encoders and collections, put together."""

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
    """What a request's images have become, and which encoder made it."""

    model: str
    """Its card's id."""
    vectors: np.ndarray
    """h, float32 (n, d)."""
    times: dict[str, float]
    """Seconds: decode (with the wait for a thread), queue (the wait for a batch), model."""
    logits: np.ndarray
    """float32 (n, C)."""
    classes: list[str]
    """The C classes' names; none of an encoder alone."""


class Engine:
    def __init__(self, encoders: str | None, index: str | Path, limits: Limits, metrics: Metrics):
        """Load, warm up, open. encoders: as ServedEncoders' `chosen`. raises BundleError."""
        threads = limits.threads or cores()
        self._decode = Decoder(threads, limits.pixels)
        self._models = ServedEncoders(encoders, index, threads, min(SMALL_PIXELS, limits.pixels), metrics.encoded)
        self._gate = Gate(limits.images_at_once)
        self.library = Library(self._models, self._gate, self._embed, limits, threads)
        self.views = ViewAnalysis(self._models, self._gate, self._decode, self.library)
        metrics.levels = lambda: (self._gate.inside, self._models.waiting)

    @property
    def cards(self) -> list[ModelCard]:
        """Of the encoders that are served, the default first."""
        return self._models.cards

    @property
    def card(self) -> ModelCard:
        """The default's."""
        return self._models.default.card

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's execution providers of the default encoder, the preferred first."""
        return [self._models.default.provider]

    def named(self, model: str | None) -> ModelCard:
        """Of the encoder of that id, or of the default. raises NotFound."""
        return self._models.named(model).card

    def refuse_when_full(self) -> None:
        """raises Busy where no image would be admitted."""
        self._gate.check()

    async def embed(self, files: list[Upload], model: str | None = None) -> EmbeddedImages:
        """n >= 1 images by the encoder of that id, or by the default. raises NotFound, Busy, Undecodable, TooLarge."""
        return await self._embed(files, self._models.named(model))

    def close(self) -> None:
        self.library.close()
        self._models.close()
        self._decode.close()

    async def _embed(self, files: list[Upload], model: ServedEncoder) -> EmbeddedImages:
        """To its end with one encoder, also when another takes its place meanwhile."""
        with self._gate.admit(len(files)), _started():
            encoded = None
            if model.reads_files and all(len(file.data) <= SMALL_BYTES for file in files):
                with suppress(TooManyPixels):
                    encoded = await model.batch(files)  # decoded where it is encoded: another thread would cost more
                    decode_s = encoded.decode_s
            if encoded is None:
                started = perf_counter()
                pixels = await self._decode(files, model.card.preprocessing)
                decode_s = perf_counter() - started
                encoded = await model.batch(pixels)
        times = {"decode": decode_s, "queue": encoded.queue_s, "model": encoded.model_s}
        return EmbeddedImages(model.card.id, encoded.vectors, times, encoded.logits, model.card.classes)


@contextmanager
def _started() -> Iterator[None]:
    """A lane that has to be started again may find another encoder in place of its own."""
    try:
        yield
    except BundleError as error:
        raise NotReady(str(error)) from error
