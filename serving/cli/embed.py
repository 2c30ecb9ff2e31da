"""`twinview embed`: the vectors of pictures, from a service that runs.

    twinview embed ~/Pictures --service http://127.0.0.1:3000 -o vectors.npy

writes a float32 array of (n, d), a row a picture in the order of their names, and vectors.csv with what each row is;
`-o vectors.parquet` puts all of it into one table, which `twinview index import` takes. Files that are no readable
pictures are listed in vectors.skipped.csv. A service that wants a key gets the one in TWINVIEW_API_KEY: an option's
would stand in the list of processes.
"""

import csv
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from export.artifact import UnreadableImage
from serving.client import Client, ServiceError
from serving.collection import exchange
from serving.collection.exchange import FileProblem, writable
from serving.collection.index import Item, content_id
from serving.indexing.originals import text
from serving.inference.thumbnail import whole_size
from training.data.sources import Picture, open_source

TOGETHER = 32  # pictures, in a request
AT_ONCE = 4  # requests: some are decoded while others are encoded
COLUMNS = ("name", "label", "split", "path")


@dataclass(frozen=True)
class EmbedSettings:
    """Embed pictures by a service: vectors and names into files."""

    data: tyro.conf.Positional[str]
    """A folder of images, a .zip of one, WebDataset shards ('shards/*.tar'), a torchvision name (cifar10, cifar100,
    stl10, ...), or shapes: the built-in set."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("vectors.npy")
    """A .npy, beside which the names go into a .csv; or a .parquet for both."""
    service: str = "http://127.0.0.1:3000"
    """Address of the service (`bentoml serve`). If it wants a key: the one in TWINVIEW_API_KEY."""
    model: str | None = None
    """One of the service's models; its default where none is named."""
    normalize: bool = False
    """Vectors of unit length."""


@dataclass
class Outcome:
    pictures: list[Picture] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    """What an index would keep of each."""
    vectors: list[np.ndarray] = field(default_factory=list)
    """(n, d) float32 each; together as many rows as there are pictures."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason, which completes "<name> ..."."""


def embed(settings: EmbedSettings) -> Outcome:
    """raises DataError, FileProblem, ServiceError"""
    _check(settings.output)
    pictures = open_source(settings.data).pictures
    with Client(settings.service, os.environ.get("TWINVIEW_API_KEY")) as client:
        model = settings.model or _default(client)
        print(f"embedding {len(pictures):,} pictures of {settings.data} with {model}")
        everything, stop = Outcome(), threading.Event()
        with tqdm(total=len(pictures), desc="embedding", unit="img", dynamic_ncols=True) as bar:
            work = partial(_embed_some, client, model, settings.normalize, stop)
            for part in _in_order(work, pictures, stop):
                everything.pictures += part.pictures
                everything.items += part.items
                everything.vectors += part.vectors
                everything.skipped += part.skipped
                bar.update(len(part.pictures) + len(part.skipped))
    written = _write(settings.output, everything, model)
    print(
        f"{len(everything.pictures):,} vectors in {' and '.join(map(str, written))}, "
        f"{len(everything.skipped):,} files skipped"
    )
    for name, reason in everything.skipped[:10]:
        print(f"  {name} {reason}")
    return everything


def _default(client: Client) -> str:
    models = client.models()
    if not models:
        client.items(limit=1)  # raises the service's own sentence
        raise ServiceError("the service has no model")
    return models[0]["id"]


def _in_order(
    work: Callable[[list[Picture]], Outcome], pictures: Sequence[Picture], stop: threading.Event
) -> Iterator[Outcome]:
    """Of TOGETHER pictures each, AT_ONCE of them under way. What is under way at the end, whatever that was, is told to
    `stop` and waited for."""
    pool = ThreadPoolExecutor(AT_ONCE, "embed")
    parts = (list(pictures[i : i + TOGETHER]) for i in range(0, len(pictures), TOGETHER))
    pending: deque[Future] = deque()
    try:
        while True:
            pending.extend(pool.submit(work, part) for part in islice(parts, 2 * AT_ONCE - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _embed_some(client: Client, model: str, normalize: bool, stop: threading.Event, pictures: list[Picture]) -> Outcome:
    """A broken picture fails its whole request: it is left out and the rest sent again, in smaller requests for as long
    as there are more of them. A busy service is asked until it has time."""
    outcome, waiting = Outcome(), []
    for picture in pictures:
        try:
            waiting.append((picture, picture.read()))
        except UnreadableImage as error:
            outcome.skipped.append((picture.name, str(error)))
    size = len(waiting)
    while waiting:
        part = waiting[:size]
        try:
            answer = client.embed([data for _, data in part], normalize=normalize, model=model)
        except ServiceError as error:
            if error.status == 429 and not stop.is_set():
                continue
            broken = re.fullmatch(r"images\[(\d+)\]", error.param or "")
            if not broken:
                raise
            picture, _ = waiting.pop(int(broken[1]))
            outcome.skipped.append((picture.name, re.sub(r"^images\[\d+\] (\(.*?\) )?", "", error.message)))
            size = max(1, size // 2)
        else:
            outcome.pictures += [picture for picture, _ in part]
            outcome.items += [item_of(picture, data) for picture, data in part]
            outcome.vectors.append(answer.vectors)
            del waiting[:size]
            size *= 2
    return outcome


def _check(output: Path) -> None:
    """Before the work, whether its fruits can be kept."""
    if output.suffix not in (".npy", ".parquet"):
        raise FileProblem(f"--output: {output} must end in .npy or .parquet")
    with writable(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        is_new = not output.exists()
        with open(output, "ab"):
            pass
        if is_new:
            output.unlink()


def _write(output: Path, outcome: Outcome, model: str) -> list[Path]:
    """The files that it has written."""
    vectors = np.concatenate(outcome.vectors) if outcome.vectors else np.zeros((0, 0), np.float32)
    rows = [tuple(_text(getattr(picture, name)) for name in COLUMNS) for picture in outcome.pictures]
    written = [output]
    if output.suffix == ".npy":
        np.save(output, vectors)
        written.append(_write_csv(output.with_suffix(".csv"), COLUMNS, rows))
    else:
        _write_parquet(output, outcome, vectors, model)
    skipped = output.with_suffix(".skipped.csv")
    if outcome.skipped:
        written.append(_write_csv(skipped, ("name", "reason"), outcome.skipped))
    else:
        skipped.unlink(missing_ok=True)  # of a run before
    return written


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[tuple]) -> Path:
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def _write_parquet(path: Path, outcome: Outcome, vectors: np.ndarray, model: str) -> None:
    with exchange.Writer(path, model, max(1, vectors.shape[1]), metadata={"split": str}) as file:
        for i in range(0, len(vectors), exchange.ROWS_AT_ONCE):
            file.write(outcome.items[i : i + exchange.ROWS_AT_ONCE], vectors[i : i + exchange.ROWS_AT_ONCE])


def item_of(picture: Picture, data: bytes) -> Item:
    """Of a picture that can be read, with its split as metadata."""
    name, label, path = (_text(value) for value in (picture.name, picture.label, picture.path))
    return Item(content_id(data), name, label, path, *whole_size(data), len(data), {"split": picture.split})


def _text(value: object) -> str | None:
    return None if value is None else text(str(value))
