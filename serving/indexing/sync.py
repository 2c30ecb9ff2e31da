"""Finds the items of a collection whose files have gone from a folder."""

import os
from collections.abc import Mapping
from pathlib import Path

from export.paths import valid_text
from serving.collection.index import Index
from serving.collection.items import is_content_id


def inside(path: str | None, folder: str | Path) -> str | None:
    """Returns the path relative to the folder; None if it is elsewhere."""
    start = valid_text(os.path.abspath(folder).rstrip(os.sep)) + os.sep
    return path[len(start) :] if path and path.startswith(start) else None


def gone(index: Index, folder: str | Path, present: Mapping[str, str]) -> list[str]:
    """Returns the ids of items from the folder whose content no file of the folder has any more. Files that cannot be
    read keep theirs.

    present  the id of each file that could be read, by its path
    """
    ids, lost = set(present.values()), []
    for id, path in index.paths().items():
        if inside(path, folder) and id not in ids:
            replaced = is_content_id(id) and path in present
            if replaced or not _may_exist(path):
                lost.append(id)
    return lost


def _may_exist(path: str) -> bool:
    """Also true for a file in a folder that cannot be read."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True
