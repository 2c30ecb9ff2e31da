"""Draws pictures of a collection, as thumbnails: the same ones for the same seed."""

import random
from collections.abc import Collection

from serving.collection.index import Index, Item, content_id
from serving.inference.decode import Upload

SPARE = 4  # additional items to read, to replace those without a thumbnail


def sample(index: Index, count: int, seed: int, without: Collection[bytes] = ()) -> list[tuple[Item, Upload]]:
    """At most `count` pictures with their thumbnails, drawn without replacement.

    without  files of pictures that are left out, whether they are the originals or their thumbnails
    raises   IndexProblem
    """
    size, drawn = index.count(), []
    ids = {content_id(data) for data in without}
    for offset in random.Random(seed).sample(range(size), min(size, count + len(without) + SPARE)):
        if len(drawn) == count:
            break
        for item in index.page(1, offset):
            thumbnail = None if item.id in ids else index.read_thumbnail(item.id)
            if thumbnail is not None and thumbnail not in without:
                drawn.append((item, Upload("collection", item.name, thumbnail)))
    return drawn
