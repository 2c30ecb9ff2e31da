"""What is read of a collection's items to compare them."""

import numpy as np

from serving.collection.index import Index
from serving.collection.items import Item
from serving.protocol.filters import Filter


class NoValues(Exception):
    """No picture has a value of the key."""


def read_items(index: Index, where: Filter | None = None) -> tuple[list[Item], np.ndarray]:
    """Returns the items that match, and their unit vectors (n, d) float32. Raises IndexProblem."""
    pages = list(index.scan(where))
    vectors = [vectors for _, vectors in pages] or [np.empty((0, index.dimension), np.float32)]
    return [item for page, _ in pages for item in page], np.concatenate(vectors)


def values_of(items: list[Item], key: str) -> list[str | None]:
    """Returns each item's value of a metadata key, or of label, in words. Raises NoValues."""
    values = [item.label if key == "label" else item.metadata.get(key) for item in items]
    if all(value is None for value in values):
        raise NoValues
    return [None if value is None else str(value) for value in values]
