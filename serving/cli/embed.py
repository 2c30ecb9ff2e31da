"""`twinview embed`: embeds pictures with a running service.

    twinview embed ~/Pictures --service http://127.0.0.1:3000 -o vectors.npy

writes a float32 array (n, d), one row per picture in the order of their names, and vectors.csv with each row's name,
label, split and path. `-o vectors.parquet` writes one table with both, which `twinview index import` reads. Files that
cannot be read as pictures are listed in vectors.skipped.csv. If the service requires a key, set TWINVIEW_API_KEY; there
is no option for it, because the list of processes would show it.
"""

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
from export.paths import valid_text
from export.spreadsheet import save_rows
from serving.client import Client, ServiceError
from serving.collection import exchange
from serving.collection.exchange import FileProblem, writable
from serving.collection.index import Item, content_id
from serving.inference.thumbnail import whole_size
from training.data.sources import SourcePicture, none_readable, open_source

REQUEST_PICTURES = 32
REQUESTS_AT_ONCE = 4  # so that some are decoded while others are encoded
COLUMNS = ("name", "label", "split", "path")


@dataclass(frozen=True)
class EmbedSettings:
    """Embed pictures with a running service; write vectors and names to files."""

    data: tyro.conf.Positional[str]
    """A folder of images, a .zip of one, WebDataset shards ('shards/*.tar'), hf:NAME for a data set of Hugging
    Face, a torchvision name (cifar10, cifar100, stl10, ...), or shapes: the built-in set of images."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("vectors.npy")
    """A .npy file, with a .csv file of the names next to it; or one .parquet file with both."""
    service: str = "http://127.0.0.1:3000"
    """Address of the service (`bentoml serve`). If it requires a key, set TWINVIEW_API_KEY."""
    model: str | None = None
    """Id of one of the service's models. Default: the service's default."""
    normalize: bool = False
    """Scale the vectors to unit length."""


@dataclass
class EmbeddedPictures:
    pictures: list[SourcePicture] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    """The same pictures as items, for a .parquet file."""
    vectors: list[np.ndarray] = field(default_factory=list)
    """Arrays (n, d) float32; together one row per picture."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Name and reason; together they form a sentence."""

    def add(self, other: "EmbeddedPictures") -> None:
        self.pictures += other.pictures
        self.items += other.items
        self.vectors += other.vectors
        self.skipped += other.skipped


def embed(settings: EmbedSettings) -> EmbeddedPictures:
    """raises DataError, FileProblem, ServiceError"""
    _check_writable(settings.output)
    pictures = open_source(settings.data).pictures
    with Client(settings.service, os.environ.get("TWINVIEW_API_KEY")) as client:
        model = settings.model or _default_model(client)
        print(f"embedding {len(pictures):,} pictures of {settings.data} with {model}")
        embedded, stop = EmbeddedPictures(), threading.Event()
        with tqdm(total=len(pictures), desc="embedding", unit="img", dynamic_ncols=True) as bar:
            embed_part = partial(_embed_part, client, model, settings.normalize, stop)
            for part in _in_order(embed_part, pictures, stop):
                embedded.add(part)
                bar.update(len(part.pictures) + len(part.skipped))
    if not embedded.pictures:
        raise none_readable(embedded.skipped, settings.data)
    written = _write(settings.output, embedded, model)
    print(
        f"{len(embedded.pictures):,} vectors in {' and '.join(map(str, written))}, "
        f"{len(embedded.skipped):,} files skipped"
    )
    for name, reason in embedded.skipped[:10]:
        print(f"  {name} {reason}")
    return embedded


def _default_model(client: Client) -> str:
    models = client.models()
    if not models:
        client.items(limit=1)  # raises ServiceError with the service's explanation
        raise ServiceError("the service has no model")
    return models[0]["id"]


def _in_order(
    embed_part: Callable[[list[SourcePicture]], EmbeddedPictures],
    pictures: Sequence[SourcePicture],
    stop: threading.Event,
) -> Iterator[EmbeddedPictures]:
    """Yields the results of REQUEST_PICTURES at a time, in order, with REQUESTS_AT_ONCE requests in progress. At the
    end, also after an error, sets `stop` and waits for the requests in progress."""
    pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, "embed")
    parts = (list(pictures[i : i + REQUEST_PICTURES]) for i in range(0, len(pictures), REQUEST_PICTURES))
    pending: deque[Future[EmbeddedPictures]] = deque()
    try:
        while True:
            pending.extend(pool.submit(embed_part, part) for part in islice(parts, 2 * REQUESTS_AT_ONCE - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _embed_part(
    client: Client, model: str, normalize: bool, stop: threading.Event, pictures: list[SourcePicture]
) -> EmbeddedPictures:
    """Embeds the pictures in as many requests as needed. A broken picture makes its whole request fail: it is skipped,
    and the others are sent again, in smaller requests if more are broken. Waits while the service is busy."""
    result, waiting = EmbeddedPictures(), []
    for picture in pictures:
        try:
            waiting.append((picture, picture.read()))
        except UnreadableImage as error:
            result.skipped.append((picture.name, str(error)))
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
            result.skipped.append((picture.name, re.sub(r"^images\[\d+\] (\(.*?\) )?", "", error.message)))
            size = max(1, size // 2)
        else:
            result.pictures += [picture for picture, _ in part]
            result.items += [item_of(picture, data) for picture, data in part]
            result.vectors.append(answer.vectors)
            del waiting[:size]
            size *= 2
    return result


def _check_writable(output: Path) -> None:
    """Raises FileProblem, before any picture is embedded."""
    if output.suffix not in (".npy", ".parquet"):
        raise FileProblem(f"--output: {output} must end in .npy or .parquet")
    with writable(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        is_new = not output.exists()
        with open(output, "ab"):
            pass
        if is_new:
            output.unlink()


def _write(output: Path, embedded: EmbeddedPictures, model: str) -> list[Path]:
    """Returns the files it has written."""
    vectors = np.concatenate(embedded.vectors) if embedded.vectors else np.zeros((0, 0), np.float32)
    rows = [tuple(_text(getattr(picture, name)) for name in COLUMNS) for picture in embedded.pictures]
    written = [output]
    if output.suffix == ".npy":
        np.save(output, vectors)
        written.append(_write_csv(output.with_suffix(".csv"), COLUMNS, rows))
    else:
        _write_parquet(output, embedded, vectors, model)
    skipped = output.with_suffix(".skipped.csv")
    if embedded.skipped:
        written.append(_write_csv(skipped, ("name", "reason"), embedded.skipped))
    else:
        skipped.unlink(missing_ok=True)  # from an earlier run
    return written


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[tuple]) -> Path:
    save_rows(path, [columns, *rows])
    return path


def _write_parquet(path: Path, embedded: EmbeddedPictures, vectors: np.ndarray, model: str) -> None:
    with exchange.ParquetWriter(path, model, max(1, vectors.shape[1]), metadata={"split": str}) as file:
        for i in range(0, len(vectors), exchange.ROWS_AT_ONCE):
            file.write(embedded.items[i : i + exchange.ROWS_AT_ONCE], vectors[i : i + exchange.ROWS_AT_ONCE])


def item_of(picture: SourcePicture, data: bytes) -> Item:
    """Returns a readable picture's item, with its split as metadata."""
    name, label, path = valid_text(picture.name), _text(picture.label), _text(picture.path)
    return Item(content_id(data), name, label, path, *whole_size(data), len(data), {"split": picture.split})


def _text(value: str | Path | None) -> str | None:
    return None if value is None else valid_text(str(value))
