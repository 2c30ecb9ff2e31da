"""Which index, collection and encoder's table a command means: options, and what they lead to."""

import os
from dataclasses import dataclass

from serving.collection.index import DEFAULT, Index, IndexProblem, WrongEncoder, collections
from serving.protocol import replies


@dataclass(frozen=True, kw_only=True)
class Place:
    index: str = os.environ.get("TWINVIEW_INDEX") or "index"
    """Folder of the collections, or s3://bucket/prefix. By default what TWINVIEW_INDEX names, else ./index."""

    def held(self, name: str | None = None) -> list[replies.Collection]:
        """Of the collection of that name, or of all: a table for every encoder, at least one. raises IndexProblem"""
        return held(self.index, name)

    def open(self, facts: replies.Collection) -> Index:
        return Index(self.index, facts.encoder, facts.dimension, facts.name)


@dataclass(frozen=True, kw_only=True)
class Collection(Place):
    collection: str = DEFAULT
    """Its name."""

    def tables(self) -> list[Index]:
        """Of all encoders. raises IndexProblem"""
        return [self.open(facts) for facts in self.held(self.collection)]

    def table(self, encoder: str | None) -> Index:
        """Of that encoder, or the only one. raises IndexProblem"""
        tables = self.tables()
        chosen = [table for table in tables if encoder in (None, table.encoder_id)]
        if len(chosen) == 1:
            return chosen[0]
        encoders = ", ".join(table.encoder_id for table in tables)
        if chosen:
            raise IndexProblem(f"{self.collection} holds vectors of {encoders}; choose one with --encoder")
        raise WrongEncoder(f"{self.collection} holds vectors of {encoders}, and none of {encoder}")


@dataclass(frozen=True, kw_only=True)
class Table(Collection):
    encoder: str | None = None
    """Id of the encoder, where the collection holds vectors of several."""

    def one(self) -> Index:
        """raises IndexProblem"""
        return self.table(self.encoder)


def held(index: str, name: str | None = None) -> list[replies.Collection]:
    """As Place.held."""
    there = collections(index)
    chosen = [facts for facts in there if name in (None, facts.name)]
    if not chosen:
        names = ", ".join(sorted({facts.name for facts in there}))
        raise IndexProblem(f"{index} holds no collection{f' {name}; it has {names}' if there else ''}")
    return chosen
