"""Checks that a collection is undamaged, by reading all of it once."""

from collections.abc import Callable, Sequence

import numpy as np

from serving.collection.items import matrix
from serving.collection.manifest import Fragment
from serving.collection.store import FAILURES, first_line
from serving.collection.table import LanceTable

NAMED = 5  # most items named in one sentence
TOLERANCE = 1e-3  # between a vector's length and 1


def verify(table: LanceTable, thumbnails: Callable[[], set[str]]) -> list[str]:
    """Returns a sentence for each kind of damage, [] if there is none. thumbnails(): ids that have a thumbnail.
    Raises IndexProblem, or LanceDB's error, if the table cannot be opened."""
    return [*_commits(table), *_files(table), *_rows(table, thumbnails), *_vector_index(table)]


def _commits(table: LanceTable) -> list[str]:
    torn = [path for path in table.store.list(f"{table.root}/_versions") if path.endswith(".torn")]
    return [
        f"{path}: a commit that a power cut left unfinished was set aside. Its pictures are missing." for path in torn
    ]


def _files(table: LanceTable) -> list[str]:
    sizes = {path: size for path, size, _ in table.store.entries(table.root)}
    sentences = []
    for fragment in table.fragments():
        for path in (f"{table.root}/{file}" for file in fragment.files):
            if not sizes.get(path):
                state = "is empty" if path in sizes else "is missing"
                sentences.append(f"{path} {state}: {fragment.rows:,} pictures cannot be read.")
    return sentences


def _rows(table: LanceTable, thumbnails: Callable[[], set[str]]) -> list[str]:
    """Finds files that cannot be read, and invalid rows."""
    checks, damaged = _Checks(table), []
    try:
        checks.read()
    except FAILURES:
        checks = _Checks(table)
        for fragment in table.fragments():  # find the damaged ones
            try:
                checks.read(fragment)
            except FAILURES as error:
                damaged.append(f"{table.root}/{fragment.files[0]} cannot be read ({first_line(error)}).")
    sentences = damaged + _sentence("have a vector whose length is not 1", checks.bad_length)
    sentences += _sentence("exist twice", checks.twice)
    if not damaged and (count := table.count()) != len(checks.names):
        sentences.append(f"The table counts {count:,} pictures, but has {len(checks.names):,} different ones.")
    present = thumbnails()
    return sentences + _sentence("have no thumbnail", [name for id, name in checks.names.items() if id not in present])


class _Checks:
    def __init__(self, table: LanceTable):
        self.table = table
        self.names: dict[str, str] = {}
        """By id."""
        self.twice: list[str] = []
        self.bad_length: list[str] = []

    def read(self, fragment: Fragment | None = None) -> None:
        new: dict[str, str] = {}
        for rows in self.table.batches(fragment):  # all columns, since any of them may be damaged
            ids, names = rows["id"].to_pylist(), rows["name"].to_pylist()
            lengths = np.linalg.norm(matrix(rows["vector"], self.table.dimension).astype(np.float64), axis=1)
            good = np.abs(lengths - 1) < TOLERANCE  # False for NaN and infinity
            self.bad_length += [name for name, fine in zip(names, good, strict=True) if not fine]
            self.twice += [name for id, name in zip(ids, names, strict=True) if id in self.names or id in new]
            new |= dict(zip(ids, names, strict=True))
        self.names |= new


def _vector_index(table: LanceTable) -> list[str]:
    try:
        table.check_index()
    except FAILURES as error:
        return [f"The vector index of {table.name} cannot be searched ({first_line(error)})."]
    return []


def _sentence(state: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = ", ..." if len(names) > NAMED else ""
    return [f"{len(names):,} of the pictures {state}: {', '.join(names[:NAMED])}{more}"]
