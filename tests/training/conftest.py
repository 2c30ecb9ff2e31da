"""A small picture set and a way to train on it in seconds."""

import numpy as np
import pytest

from training.config import PretrainSettings
from training.data import shapes


class RandomPictures:
    """In place of a PixelStore."""

    source = "pixels"

    def __init__(self, n: int):
        self.pixels = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
        self.labels = np.full(n, -1)


@pytest.fixture(scope="session")
def small_shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "some shapes"
    shapes.make(folder, train=64, test=20, size_px=24)
    return folder


@pytest.fixture(scope="session")
def small_settings(small_shapes):
    """Three epochs of two steps each."""

    def make(**changes) -> PretrainSettings:
        small = {"data": str(small_shapes), "name": "small", "size_px": 16, "batch_size": 32, "epochs": 3}
        return PretrainSettings(**small | changes)

    return make
