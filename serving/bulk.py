"""Embed a collection of pictures and add it to the index, so that it can be searched.

    python serving/bulk.py --data ~/Pictures
    python serving/bulk.py --data ~/Pictures --watch          then follow changes in the folder
    python serving/bulk.py --data list.parquet                one row per picture; further columns become metadata
    python serving/bulk.py --reembed --encoder runs/new/encoder

Pictures that are already in the index are not embedded again. Interrupted? Run it again to resume. Files that cannot be
read as pictures are listed in INDEX/skipped.csv; if the index is an object store, in COLLECTION.skipped.csv in the
current folder.
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
from serving.cli.options import DEFAULT_ENCODER, CollectionOptions
from serving.collection.index import DEFAULT, Index, IndexProblem, WrongEncoder, collections
from serving.indexing.fill import Tally, batch_encoder, fill, write_skipped
from serving.indexing.originals import Originals, indexed_originals, open_originals
from serving.inference.encoder import find_bundle
from serving.limits import lower_priority
from training.data.sources import DataError


@dataclass(frozen=True, kw_only=True)
class BulkSettings(CollectionOptions):
    data: str | None = None
    """A folder of images, a .zip of one, WebDataset shards ('shards/*.tar'), a torchvision name (cifar10, cifar100,
    stl10, ...), a .parquet with a column path or image, or shapes: the built-in set of images."""
    encoder: str | None = DEFAULT_ENCODER
    """An encoder bundle's folder, or a tag of BentoML's model store. Default: the first in TWINVIEW_ENCODER, or the
    newest under runs/."""
    split: Literal["all", "train", "test"] = "all"
    """The split to read, if the data has several."""
    watch: bool = False
    """Follow the folder: files that are added, changed or removed are updated in the index within seconds. Ctrl-C ends
    it."""
    reembed: bool = False
    """Embed with another encoder, whose vectors are stored in addition. Without --data, the pictures of the collection
    are read again from their paths."""
    ray: bool = False
    """Distribute the work over a Ray cluster (install twinview[ray]). All machines must reach data and index at the
    same path."""


def run(settings: BulkSettings) -> Tally:
    """raises DataError, BundleError, IndexProblem; KeyboardInterrupt after storing what is done"""
    _check(settings)
    bundle = find_bundle(settings.encoder)
    index = Index(settings.index, bundle.card.id, bundle.card.dimension, settings.collection)
    _check_index_outside(settings.data, index)
    known = _known_ids(index, settings.reembed)
    tally = Tally()
    if settings.watch:
        from serving.indexing.follow import follow

        follow(Path(settings.data or "").expanduser(), batch_encoder(bundle), index, _skipped_path(index))
        return tally
    if settings.reembed and settings.data is None:
        originals, source = _own_originals(settings, bundle), f"the collection {index.name}"
    else:
        originals, source = open_originals(settings.data, settings.split), settings.data
    target = settings.index if index.name == DEFAULT else f"{settings.index}, collection {index.name}"
    print(f"embedding {originals.count:,} pictures of {source} with {bundle.card.id} into {target}")
    try:
        if settings.ray:
            from serving.indexing.cluster import fill_by_ray

            with index.filling():
                fill_by_ray(originals, bundle, index, tally, known, settings.reembed)
        else:
            fill(originals.files, originals.count, batch_encoder(bundle), index, tally, known, settings.reembed)
    except KeyboardInterrupt:
        print(f"interrupted: {tally}; run the same command again to resume")
        raise
    index.maintain()
    skipped = _skipped_path(index)
    write_skipped(skipped, tally.skipped)
    listed = f" (see {skipped})" if tally.skipped else ""
    print(f"{tally}{listed}; the index holds {index.count():,}")
    return tally


def command(settings: BulkSettings) -> Tally:
    """`run` at low priority, so that a service on the same machine stays fast."""
    lower_priority()
    return run(settings)


def _check(settings: BulkSettings) -> None:
    if settings.watch and (settings.ray or settings.reembed or settings.split != "all"):
        raise DataError("--watch cannot be combined with --ray, --reembed or --split: it follows a whole folder")
    if settings.watch and not os.path.isdir(os.path.expanduser(settings.data or "")):
        raise DataError(f"--watch needs a folder, and {settings.data or 'no --data'} is not one")


def _check_index_outside(data: str | None, index: Index) -> None:
    folder, inside = os.path.abspath(os.path.expanduser(data or "")), index.store.local
    if data and os.path.isdir(folder) and inside is not None:
        parts = Path(os.path.relpath(inside, folder)).parts
        if not any(part.startswith(".") for part in parts):  # hidden folders are not read
            raise DataError(f"the index {index.store.uri} is inside {data}, so its thumbnails would be indexed too")


def _known_ids(index: Index, allow_other_encoder: bool) -> set[str]:
    try:
        return index.ids()
    except WrongEncoder:
        if not allow_other_encoder:
            raise
        return set()


def _own_originals(settings: BulkSettings, bundle: Bundle) -> Originals:
    """Returns the pictures of the collection, listed from the largest table of another encoder."""
    tables = [facts for facts in collections(settings.index) if facts.name == settings.collection]
    others = [facts for facts in tables if facts.encoder != bundle.card.id]
    if not others:
        reason = f"only holds vectors of {bundle.card.id}" if tables else "does not exist"
        raise DataError(f"nothing to re-embed: the collection {settings.collection} {reason} in {settings.index}")
    return indexed_originals(settings.open(max(others, key=lambda facts: facts.count)))


def _skipped_path(index: Index) -> Path:
    return index.store.local / "skipped.csv" if index.store.local else Path(f"{index.name}.skipped.csv")


def main() -> None:
    import tyro

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends it like Ctrl-C
    try:
        command(tyro.cli(BulkSettings, description=__doc__))
    except (DataError, BundleError, IndexProblem, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
