"""Options of several commands: which index, collection and encoder's table they work on."""

import os
import sys
from dataclasses import dataclass

from serving.collection.index import DEFAULT, Index, IndexProblem, WrongEncoder, existing_collections
from serving.collection.reembedding import Reembedding
from serving.protocol.replies import Collection

DEFAULT_ENCODER = os.environ.get("TWINVIEW_ENCODER", "").partition(",")[0].strip() or None


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    index: str = os.environ.get("TWINVIEW_INDEX") or "index"
    """Folder of the collections, or s3://bucket/prefix. Default: TWINVIEW_INDEX, or ./index."""

    def open(self, collection: Collection) -> Index:
        return Index(self.index, collection.encoder, collection.dimension, collection.name)


@dataclass(frozen=True, kw_only=True)
class CollectionOptions(IndexOptions):
    collection: str = DEFAULT
    """Name of the collection."""

    def tables(self) -> list[Index]:
        """One table for each encoder. Raises IndexProblem."""
        return [self.open(collection) for collection in existing_collections(self.index, self.collection)]

    def table(self, encoder: str | None) -> Index:
        """Returns the table of that encoder; for None the only table. Raises IndexProblem."""
        tables = self.tables()
        chosen = [table for table in tables if encoder in (None, table.encoder_id)]
        if len(chosen) == 1:
            return chosen[0]
        encoders = ", ".join(table.encoder_id for table in tables)
        if chosen:
            raise IndexProblem(f"{self.collection} holds vectors of {encoders}; choose one with --encoder")
        raise WrongEncoder(f"{self.collection} holds vectors of {encoders}, but none of {encoder}")


@dataclass(frozen=True, kw_only=True)
class TableOptions(CollectionOptions):
    encoder: str | None = None
    """Id of the encoder, if the collection holds vectors of several."""

    def chosen_table(self) -> Index:
        """Says on stderr if some items are still to be embedded with its encoder. Raises IndexProblem."""
        table = self.table(self.encoder)
        progress = Reembedding(table).progress()
        if progress.missing:
            words = f"{progress.done:,} of {progress.total:,} items are embedded again; only these are used"
            print(f"note: {self.collection} is not complete for {table.encoder_id}: {words}", file=sys.stderr)
        return table


def least_cosine(index: Index, threshold: float | None, closer_than: float | None) -> float | None:
    """Returns the limit that --threshold or --closer-than gives, None without either. Raises IndexProblem."""
    if closer_than is None:
        return threshold
    if threshold is not None:
        raise IndexProblem("give either --threshold or --closer-than, not both")
    if not 0 <= closer_than <= 1:
        raise IndexProblem(f"--closer-than {closer_than:g}: must be from 0 to 1")
    return index.random_pairs.cosine(closer_than)
