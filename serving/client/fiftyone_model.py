"""An encoder that a service serves, as a model of FiftyOne, which must be installed (docs/integrations.md).

FiftyOne takes only subclasses of its own class Model. This one was tried with FiftyOne 1.22.1.
"""

from collections.abc import Iterable
from typing import Self

import numpy as np
from fiftyone.core.models import EmbeddingsMixin, Model  # pyrefly: ignore[missing-import]  # not installed by default
from PIL import Image

from serving.client.sync_client import Client


class TwinviewModel(EmbeddingsMixin, Model):
    """Embeds images that FiftyOne has read, (H, W, 3) uint8 arrays in RGB, as vectors of unit length.

    url      where the service listens, for instance http://127.0.0.1:3000
    api_key  one of its keys
    model    id of an encoder from /v1/models, by default the service's default one

    Raises ServiceError when a picture cannot be embedded or the service cannot be reached.
    """

    media_type = "image"
    has_embeddings = True
    ragged_batches = False  # images of one batch may have different sizes; FiftyOne means those after `transforms`
    transforms = None  # the service resizes and normalises
    preprocess = False

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None):
        self._url, self._api_key, self._model = url, api_key, model
        self._client: Client | None = None

    def __enter__(self) -> Self:
        """FiftyOne does it around a computation, for which the connection is then kept."""
        self._client = Client(self._url, self._api_key)
        return self

    def __exit__(self, *_: object) -> None:
        if self._client:
            self._client.close()
        self._client = None

    def embed(self, arg: np.ndarray) -> np.ndarray:
        """Returns the vector (d,) float32 of an image."""
        return self.embed_all([arg])[0]

    def embed_all(self, args: Iterable[np.ndarray]) -> np.ndarray:
        """Returns the vectors (n, d) float32 of n images."""
        if self._client is None:
            with self:
                return self.embed_all(args)
        images = [Image.fromarray(image) for image in args]
        return self._client.embed(images, normalize=True, model=self._model).vectors

    def predict(self, arg: np.ndarray) -> None:
        raise NotImplementedError("a Twinview model has embeddings and no predictions: use compute_embeddings")
