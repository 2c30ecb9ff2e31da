"""Embed a collection of pictures and add it to the index, so that it can be searched.

    python serving/bulk.py --data ~/Pictures
    python serving/bulk.py --data ~/Pictures --watch          and go on with whatever comes, changes and goes
    python serving/bulk.py --data list.parquet                a row a picture; more columns become metadata
    python serving/bulk.py --reembed --encoder runs/new/encoder

Pictures that are in the index already are left as they are, so what was broken off is taken up by running it again.
Files that are no readable pictures are listed in INDEX/skipped.csv; where the index is an object store, here, in a file
that bears the collection's name.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export.artifact import Bundle, BundleError
from serving.collection.index import DEFAULT, Index, IndexProblem, WrongEncoder, collections
from serving.indexing.fill import Tally, fill, work_of, write_skipped
from serving.indexing.originals import Originals, open_originals, stored
from serving.inference.encoder import find_bundle
from serving.limits import give_way
from training.data.sources import DataError


@dataclass(frozen=True)
class BulkSettings:
    data: str | None = None
    """A folder of images, a .zip of one, WebDataset shards ('shards/*.tar'), a torchvision name (cifar10, cifar100,
    stl10, ...), a .parquet with a column path or image, or shapes: the built-in set."""
    encoder: str | None = os.environ.get("TWINVIEW_ENCODER", "").partition(",")[0].strip() or None
    """An encoder bundle's folder, or a tag of BentoML's model store. By default the first that TWINVIEW_ENCODER names,
    else the newest under runs/."""
    index: str = os.environ.get("TWINVIEW_INDEX", "index")
    """Folder of the collections, made where there is none, or s3://bucket/prefix. By default what TWINVIEW_INDEX names,
    else ./index."""
    split: Literal["all", "train", "test"] = "all"
    """Which part, where the data has parts."""
    collection: str = DEFAULT
    """Its name."""
    watch: bool = False
    """Follow the folder: what is new, changed or removed there is so in the index within seconds. Ctrl-C ends it."""
    reembed: bool = False
    """Let another encoder's vectors stand beside those that the collection has. Without --data its own pictures are
    read again, from where they were."""
    ray: bool = False
    """Share the work among the machines of a Ray cluster (the extra twinview[ray]); all must reach data and index."""


def run(settings: BulkSettings) -> Tally:
    """raises DataError, BundleError, IndexProblem; KeyboardInterrupt after keeping what was done."""
    _check(settings)
    bundle = find_bundle(settings.encoder)
    index = Index(settings.index, bundle.card.id, bundle.card.dimension, settings.collection)
    _refuse_inside(settings.data, index)
    known = _known(index, settings.reembed)
    tally = Tally()
    if settings.watch:
        from serving.indexing.follow import follow

        follow(Path(settings.data).expanduser(), work_of(bundle), index, _skipped_path(index))
        return tally
    own = settings.reembed and settings.data is None
    originals = _own(settings, bundle) if own else open_originals(settings.data, settings.split)
    source = f"the collection {index.name}" if own else settings.data
    print(f"embedding {originals.count:,} pictures of {source} with {bundle.card.id} into {_place(settings)}")
    try:
        if settings.ray:
            from serving.indexing.cluster import fill_by_ray

            fill_by_ray(originals, bundle, index, tally, known, settings.reembed)
        else:
            fill(originals.each, originals.count, work_of(bundle), index, tally, known, settings.reembed)
    except KeyboardInterrupt:
        print(f"stopped: {tally}; the same command goes on from here")
        raise
    index.maintain()
    skipped = _skipped_path(index)
    write_skipped(skipped, tally.skipped)
    listed = f" (see {skipped})" if tally.skipped else ""
    print(f"{tally}{listed}; the index holds {index.count():,}")
    return tally


def command(settings: BulkSettings) -> Tally:
    """`run`, behind whoever else wants the cores, such as a service on this machine."""
    give_way()
    return run(settings)


def _check(settings: BulkSettings) -> None:
    if settings.watch and (settings.ray or settings.reembed or settings.split != "all"):
        raise DataError("--watch goes with neither --ray nor --reembed nor --split: it follows a folder as a whole")
    if settings.watch and not os.path.isdir(os.path.expanduser(settings.data or "")):
        raise DataError(f"--watch follows a folder, and {settings.data or '--data'} is none")


def _refuse_inside(data: str | None, index: Index) -> None:
    folder, inside = os.path.abspath(os.path.expanduser(data or "")), index.store.local
    if data and os.path.isdir(folder) and inside is not None:
        parts = Path(os.path.relpath(inside, folder)).parts
        if not any(part.startswith(".") for part in parts):  # what is hidden, or outside, is no picture
            raise DataError(f"the index {index.store.uri} lies in {data}, which would take its thumbnails for pictures")


def _known(index: Index, beside: bool) -> set[str]:
    try:
        return index.ids()
    except WrongEncoder:
        if not beside:
            raise
        return set()


def _own(settings: BulkSettings, bundle: Bundle) -> Originals:
    """The pictures of the collection, by the fullest table that another encoder has."""
    tables = [facts for facts in collections(settings.index) if facts.name == settings.collection]
    others = [facts for facts in tables if facts.encoder != bundle.card.id]
    if not others:
        held = f"holds vectors of {bundle.card.id} alone" if tables else "is not there"
        raise DataError(f"nothing to embed anew: the collection {settings.collection} {held} in {settings.index}")
    fullest = max(others, key=lambda facts: facts.count)
    return stored(Index(settings.index, fullest.encoder, fullest.dimension, settings.collection))


def _place(settings: BulkSettings) -> str:
    collection = "" if settings.collection == DEFAULT else f", collection {settings.collection}"
    return f"{settings.index}{collection}"


def _skipped_path(index: Index) -> Path:
    return index.store.local / "skipped.csv" if index.store.local else Path(f"{index.name}.skipped.csv")


def main() -> None:
    import tyro

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends a service ends it as Ctrl-C does
    try:
        command(tyro.cli(BulkSettings, description=__doc__))
    except (DataError, BundleError, IndexProblem, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
