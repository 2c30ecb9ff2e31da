"""Checks that a collection is undamaged, by reading all of it once."""

from collections.abc import Mapping, Sequence

import numpy as np

from serving.collection.items import CHECKSUM, is_checksum, matrix, to_item
from serving.collection.manifest import Fragment
from serving.collection.store import FAILURES, first_line
from serving.collection.table import LanceTable
from serving.protocol.shown import counted

NAMED = 5  # most items named in one sentence
TOLERANCE = 1e-3  # between a vector's length and 1


def verify(table: LanceTable, originals: Mapping[str, int]) -> list[str]:
    """Returns a sentence for each kind of damage, [] if there is none. originals: sizes in bytes of those kept, by id.
    Raises IndexProblem, or LanceDB's error, if the table cannot be opened."""
    return [*_commits(table), *_files(table), *_rows(table, originals), *_vector_index(table)]


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
                sentences.append(f"{path} {state}: {counted(fragment.rows)} cannot be read.")
    return sentences


def _rows(table: LanceTable, originals: Mapping[str, int]) -> list[str]:
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
    sentences += _sentence("are not as they were written", checks.changed)
    sentences += _sentence("exist twice", checks.twice)
    cut = [checks.names[id] for id, size in checks.sizes.items() if originals.get(id, size) != size]
    sentences += _sentence("have an original of another size than was uploaded", cut)
    if not damaged and (count := table.count()) != len(checks.names):
        sentences.append(f"The table counts {count:,} pictures, but has {len(checks.names):,} different ones.")
    return sentences


class _Checks:
    def __init__(self, table: LanceTable):
        self.table = table
        self.names: dict[str, str] = {}
        """By id."""
        self.sizes: dict[str, int] = {}
        """Bytes of the pictures' files, by id."""
        self.twice: list[str] = []
        self.bad_length: list[str] = []
        self.changed: list[str] = []
        """Rows that no longer have their checksum."""

    def read(self, fragment: Fragment | None = None) -> None:
        new: dict[str, str] = {}
        columns = self.table.columns()
        for rows in self.table.batches(fragment):  # all columns, since any of them may be damaged
            ids, names = rows["id"].to_pylist(), rows["name"].to_pylist()
            vectors = matrix(rows["vector"], self.table.dimension)
            lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
            good = np.abs(lengths - 1) < TOLERANCE  # False for NaN and infinity
            self.bad_length += [name for name, fine in zip(names, good, strict=True) if not fine]
            self.twice += [name for id, name in zip(ids, names, strict=True) if id in self.names or id in new]
            for row, vector in zip(rows.drop_columns(["vector"]).to_pylist(), vectors, strict=True):
                item = to_item(row, columns)
                if item.bytes:
                    self.sizes[item.id] = item.bytes
                if not is_checksum(row.get(CHECKSUM), item, vector):
                    self.changed.append(item.name or str(item.id))
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
