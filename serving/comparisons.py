"""Comparisons of the items of a collection: which to label first, labels for others, odd ones, what another collection
lacks, and a division into parts. None of them changes anything, and one request is answered at a time."""

from collections.abc import Callable
from typing import TypeVar

from serving.collection.index import others_in_words
from serving.collection.problems import UnknownKey, WrongEncoder
from serving.collection.reembedding import Reembedding
from serving.curation.coverage_items import NoneToCover, TooFewToCover, uncovered_items
from serving.curation.items import NoValues
from serving.curation.odd_items import FINDERS, CannotCompare
from serving.curation.split import WrongShares, as_one
from serving.curation.split_items import TooFewToDivide, split_items
from serving.curation.suggest import TooFewLabels, suggest_labels
from serving.errors import Conflict, Malformed, NotFound
from serving.library import Library
from serving.limits import Gate
from serving.protocol import replies
from serving.protocol.filters import Filter
from serving.protocol.queries import CoverageQuery, OddQuery, PickQuery, SplitQuery, SuggestQuery
from serving.protocol.shown import counted

T = TypeVar("T")


class Comparisons:
    def __init__(self, library: Library):
        self._library = library
        self.gate = Gate(1, "comparison of items")

    async def pick(self, name: str, query: PickQuery, where: Filter | None) -> replies.Picked:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        from serving.curation.pick_items import pick_items  # scikit-learn takes a second to load

        options = (query.k, query.method, where, query.balanced_by, query.labelled_too, query.seed)
        try:
            picked, missing = await self._compare(name, pick_items, *options)
        except NoValues as error:
            raise _no_values("balanced_by", name, query.balanced_by) from error
        return replies.Picked(picked.items, picked.candidates, missing=missing)

    async def suggest(self, name: str, query: SuggestQuery, where: Filter | None) -> replies.Suggested:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        try:
            found, missing = await self._compare(name, suggest_labels, query.k, where)
        except TooFewLabels as error:
            raise Malformed(f"{name} {error}", "name") from error
        items = [
            replies.SuggestedItem(**vars(item), suggested=label, share=share) for item, label, share in found.items
        ]
        return replies.Suggested(items, found.candidates, missing=missing)

    async def odd(self, name: str, query: OddQuery, where: Filter | None) -> replies.Odd:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        try:
            found, missing = await self._compare(name, FINDERS[query.kind], query.k, where)
        except CannotCompare as error:
            raise Malformed(f"{name} {error}", "name") from error
        items = []
        for item, (*reason, value) in found.rows:
            items.append(replies.OddItem(**vars(item), reason=str(reason[0]) if reason else None, value=float(value)))
        return replies.Odd(items, found.odd, found.compared, found.left_out, missing=missing)

    async def coverage(
        self, name: str, query: CoverageQuery, where: Filter | None, by_where: Filter | None
    ) -> replies.Coverage:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        index, by = self._library.index(name), query.by or name
        await self._library.refuse_missing(index)
        other = self._library.index(by, index.encoder_id)
        if not await self._library.read(other.exists):
            raise NotFound(
                f"by: there is no collection {by}; {others_in_words(await self._library.describe_all())}", "by"
            )
        if other.stored == index.stored and query.filter == query.by_filter:
            message = f"{name} is compared with itself; name another collection, or give filter and by_filter"
            raise Malformed(f"by: {message}", "by")
        try:
            await self._library.read(other.count, by_where)
        except WrongEncoder as error:
            raise Conflict(f"by: {error}", "by") from error
        except UnknownKey as error:
            raise Malformed(f"by_filter: {error}", "by_filter") from error
        try:
            found, missing = await self._compare(name, uncovered_items, other, where, by_where)
        except NoneToCover as error:
            raise Malformed(f"filter: no item of {name} matches", "filter") from error
        except TooFewToCover as error:
            raise Malformed(f"by: {by}{' with by_filter' if by_where else ''} {error}", "by") from error
        items = [
            replies.UncoveredItem(**vars(item), similarity=cosine, nearest=near)
            for item, cosine, near in found.rows[: query.k]
        ]
        return replies.Coverage(
            items, len(found.rows), found.compared, found.by, found.both, found.share, found.usual, missing=missing
        )

    async def split(self, name: str, query: SplitQuery, where: Filter | None) -> replies.Split:
        """Raises Malformed, NotFound, Busy, IndexProblem."""
        shares = query.parts
        try:
            shares = as_one(shares)
            found, missing = await self._compare(
                name, split_items, shares, where, query.group_by, query.threshold, query.seed
            )
        except WrongShares as error:
            raise Malformed(f"parts: {error}", "parts") from error
        except TooFewToDivide as error:
            count = counted(error.args[0], "item")
            with_ = " with this filter" if where else ""
            raise Malformed(f"parts: {name} has {count}{with_}, fewer than the {len(shares)} parts", "parts") from error
        except NoValues as error:
            raise _no_values("group_by", name, query.group_by) from error
        parts: dict[str, list[str]] = {part: [] for part in shares}
        for item, part in zip(found.items, found.parts, strict=True):
            parts[part].append(item.id)
        together = [[item.id for item in group] for group in found.copies]
        return replies.Split(parts, together, found.threshold, found.notes, missing=missing)

    async def _compare(self, name: str, compare: Callable[..., T], *options: object) -> tuple[T, int]:
        """Returns compare(index of the collection, *options), for one request at a time, and how many items are still
        to be embedded again. Raises NotFound, Busy, and what `compare` raises."""
        index = self._library.index(name)
        await self._library.refuse_missing(index)
        with self.gate.admit(1):
            progress = await self._library.read(Reembedding(index).progress)
            return await self._library.read(compare, index, *options), progress.missing


def _no_values(field: str, name: str, key: str | None) -> Malformed:
    return Malformed(f"{field}: no item of {name} has a value of {key}", field)
