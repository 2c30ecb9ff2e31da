"""What a search and a collection come to, as it is shown: a heading, and tiles or a sentence."""

from dataclasses import replace

from serving.client import ServiceError
from ui.search.conditions import parsed
from ui.search.picture import notice
from ui.search.query import Query, Settings, nearest
from ui.widgets.grid import columns_html, grid_html, selection_html

PAGE = 60  # pictures of the collection at a time
EMPTY = "The collection is empty. Fill it with `python serving/bulk.py --data ~/Pictures`, then open this page again."
ALONE = "There is no other picture in the collection yet."
FAR = "No picture is as alike as {least:.2f}. Lower the least similarity to see the nearest."
NONE = "No picture holds to {where}. Take a condition away."


async def browse(client, offset: int, settings: Settings) -> tuple[str, str, int]:
    """Heading, grid and size of the collection, from `offset` on. raises ServiceError, ConditionProblem"""
    where, of = parsed(settings.where), {"collection": settings.collection, "model": settings.encoder}
    try:
        answer = await client.items(PAGE, offset, where, **of)
    except ServiceError as error:
        if error.status != 404:
            raise
        return "", notice(EMPTY), 0  # nobody has put anything into it yet
    count, items = answer.count, answer.items
    if not count:
        return "", notice(_nothing(settings, EMPTY)), 0
    if count > PAGE:
        extent = f"{offset + 1:,} to {offset + len(items):,} of {count:,} pictures"
    else:
        extent = "1 picture" if count == 1 else f"{count:,} pictures"
    heading = f"<h2>Your collection</h2><p>{extent}. Choose one to find others like it.</p>"
    view = f"all\n{settings.where}\n{settings.encoder}"
    return heading, selection_html(count, settings.collection, view) + grid_html(items, settings.collection), count


async def neighbours(client, query: Query, settings: Settings) -> tuple[str, str]:
    """Heading and grid of the nearest; of two encoders side by side. raises ServiceError, UploadFailed,
    ConditionProblem"""
    of, results = settings.collection, await nearest(client, query, settings)
    tiles = grid_html(results, of) if results else notice(_nothing(settings, ALONE if query.picture.id else EMPTY))
    words = "Nearest first, with the cosine of the embeddings. Choose one to go on from there."
    if settings.beside:
        others = await nearest(client, query, replace(settings, encoder=settings.beside, beside=None))
        both = {item.id for item in results} & {item.id for item in others}
        words = f"{len(both)} of {max(len(results), len(others))} are found by both encoders, and marked."
        grids = [grid_html(some, of, both) if some else notice("Nothing.") for some in (results, others)]
        tiles = columns_html([settings.encoder or "The service's own encoder", settings.beside], grids)
    elif not results:
        return "", tiles
    bar = selection_html(len(results), of, f"{query}{settings}")
    return f"<h2>Most alike</h2><p>{words}</p>", bar + tiles


def _nothing(settings: Settings, otherwise: str) -> str:
    if settings.least:
        return FAR.format(least=settings.least)
    return NONE.format(where=" and ".join(f"`{one}`" for one in settings.where)) if settings.where else otherwise
