"""The file of the picture that an item was made from. Uploaded files are kept in the index, others have a path.

An item's path comes from whoever added the item, and could name any file. So a path is followed only below folders that
the owner of the machine has named: those that a command was given. For the service the file must also prove itself: it
is used only if its hash is the item's id, which means that it is the very picture that was indexed.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from export.artifact import UnreadableImage, read_regular_file
from serving.collection.index import Index
from serving.collection.items import Item, content_id


def original_file(index: Index, item: Item, folders: Iterable[str], most_bytes: int) -> bytes:
    """The file of the item's picture: the one that was kept when it was uploaded, or the one at its path.

    folders, most_bytes, raises  as `read_original`; also IndexProblem
    """
    kept = index.read_original(item.id)
    if kept is None:
        return read_original(item, folders, most_bytes)
    if len(kept) != item.bytes:
        raise UnreadableImage("is not as it was uploaded: its file has another size")
    return kept


def read_below(path: str | None, folders: Iterable[str], most_bytes: int) -> bytes:
    """The bytes of the file at an item's path. Raises UnreadableImage.

    folders     the file must be below one of them, after following links
    most_bytes  larger files are refused
    """
    if path is None:
        raise UnreadableImage("is not a file of its own")
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UnreadableImage("cannot be read: its path is not allowed") from error
    if not any(real.is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise UnreadableImage(f"is outside the folders that may be read; --pictures names more: {path}")
    return read_regular_file(real, most_bytes)


def read_original(item: Item, folders: Iterable[str], most_bytes: int) -> bytes:
    """The file of the item's picture.

    most_bytes  largest file that is read
    raises      UnreadableImage when the file is not there, has changed, or was never a file of its own
    """
    data = read_below(item.path, folders, min(item.bytes, most_bytes))
    if content_id(data) != item.id:
        raise UnreadableImage("is not the picture that was indexed")
    return data
