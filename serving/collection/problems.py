"""Errors of the collections. Each message says what is wrong and what to do."""

from serving.protocol.filters import FilterProblem


class IndexProblem(Exception):
    """A folder, object store or collection that cannot be read or written, or an item that cannot be stored."""


class WrongEncoder(IndexProblem):
    """The collection holds vectors of another encoder."""


class BadItem(IndexProblem):
    """An item that cannot be stored as given."""


class BadName(IndexProblem):
    """A name that a collection cannot have, or that is taken or an alias."""


class UnknownKey(IndexProblem, FilterProblem):
    """A filter on a key that no item has, or that compares it with a value of another type."""


class NothingToUndo(IndexProblem):
    """A collection of which no earlier version is kept."""


class TooFewItems(IndexProblem):
    """A collection that has too few items to rank a cosine among random pairs of them."""
