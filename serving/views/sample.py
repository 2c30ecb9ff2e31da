"""Some pictures of a collection, by their thumbnails: the same ones for the same seed."""

import random
from collections.abc import Collection

from serving.collection.index import Index, Item, content_id
from serving.inference.decode import File

SPARE = 4  # more are looked at, for those that have no thumbnail


def sample(index: Index, count: int, seed: int, without: Collection[bytes] = ()) -> list[tuple[Item, File]]:
    """At most `count` pictures with their thumbnails, drawn without replacement.

    without  pictures as files: neither they nor what was made of them is drawn
    raises   IndexProblem
    """
    size, found = index.count(), []
    ids = {content_id(data) for data in without}
    for offset in random.Random(seed).sample(range(size), min(size, count + len(without) + SPARE)):
        if len(found) == count:
            break
        for item in index.page(1, offset):
            thumbnail = None if item.id in ids else index.read_thumbnail(item.id)
            if thumbnail is not None and thumbnail not in without:
                found.append((item, File("collection", item.name, thumbnail)))
    return found
