"""Whether a collection is whole: everything is read once."""

import numpy as np

from serving.collection import manifest
from serving.collection.items import matrix
from serving.collection.store import StoreProblem, first_line

NAMED = 5  # items of one sentence
EXACT = 1e-3  # by which a vector's length may differ from 1


def verify(index) -> list[str]:
    """Sentences about what is wrong with a serving.collection.index.Index; [] is sound."""
    try:
        with index._table.explained("read"):
            table = index._opened()
            if table is None:
                return []
            return [*_put_aside(index), *_files(index, table), *_rows(index, table), *_vector_index(index, table)]
    except StoreProblem as problem:
        return [str(problem)]


def _put_aside(index) -> list[str]:
    root = index._table.root
    torn = [path for path in index.store.list(f"{root}/_versions") if path.endswith(".torn")]
    return [
        f"{path}: a commit that a power cut left unfinished was put aside. Its pictures are not there." for path in torn
    ]


def _files(index, table) -> list[str]:
    """Files that are missing or without content."""
    root = index._table.root
    sizes = {path: size for path, size, _ in index.store.entries(root)}
    found = []
    for fragment in _fragments(index, table):
        for file in fragment.files:
            if not sizes.get(f"{root}/{file}"):
                state = "is empty" if f"{root}/{file}" in sizes else "is missing"
                found.append(f"{root}/{file} {state}: {fragment.rows:,} pictures cannot be read.")
    return found


def _rows(index, table) -> list[str]:
    """Files that cannot be read, rows that are not what they should be."""
    checks = _Checks(index.dimension)
    try:
        checks.read(table, None)
        damaged = []
    except (RuntimeError, ValueError, OSError):
        checks, damaged = _Checks(index.dimension), []
        for fragment in _fragments(index, table):  # which is it?
            first = fragment.number << 32  # Lance's row address: fragment, then row
            try:
                checks.read(table, f"_rowaddr >= {first} AND _rowaddr < {first + 2**32}")
            except (RuntimeError, ValueError, OSError) as error:
                damaged.append(f"{index._table.root}/{fragment.files[0]} cannot be read ({first_line(error)}).")
    found = damaged + checks.sentences()
    if not damaged and (count := table.count_rows()) != len(checks.names):
        found.append(f"{count:,} pictures are counted and {len(checks.names):,} different ones read.")
    thumbnails = set(index.store.list(f"thumbnails/{index.name}"))
    without = [name for id, name in checks.names.items() if index.thumbnail_path(id) not in thumbnails]
    return found + _sentence("have no thumbnail", without)


class _Checks:
    """What reading rows has shown."""

    def __init__(self, dimension: int):
        self.dimension = dimension
        self.names: dict[str, str] = {}
        self.twice: list[str] = []
        self.bent: list[str] = []

    def read(self, table, condition: str | None) -> None:
        query = table.search()
        if condition is not None:
            query = query.where(condition)
        names: dict[str, str] = {}
        for rows in query.to_batches(batch_size=4096):  # all columns, as any may be damaged
            ids, called = rows["id"].to_pylist(), rows["name"].to_pylist()
            lengths = np.linalg.norm(matrix(rows["vector"], self.dimension).astype(np.float64), axis=1)
            good = np.abs(lengths - 1) < EXACT  # False for what is not finite
            self.bent += [name for name, fine in zip(called, good, strict=True) if not fine]
            self.twice += [name for id, name in zip(ids, called, strict=True) if id in self.names or id in names]
            names |= dict(zip(ids, called, strict=True))
        self.names |= names

    def sentences(self) -> list[str]:
        return _sentence("have a vector whose length is not 1", self.bent) + _sentence("are there twice", self.twice)


def _vector_index(index, table) -> list[str]:
    """Searching through it reads all of it."""
    if index._table.index_facts(table) is None:
        return []
    try:
        vector = np.full((1, index.dimension), index.dimension**-0.5, np.float32)
        index._table.query(table, vector, 1, "true").to_arrow()
    except (RuntimeError, ValueError, OSError) as error:
        return [f"The index of {index.name} cannot be searched ({first_line(error)})."]
    return []


def _fragments(index, table) -> tuple[manifest.Fragment, ...]:
    return manifest.read(index.store, index._table.root, table.version).fragments


def _sentence(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = ", ..." if len(names) > NAMED else ""
    return [f"{len(names):,} of the pictures {what}: {', '.join(names[:NAMED])}{more}"]
