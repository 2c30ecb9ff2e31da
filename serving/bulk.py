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
import shlex
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export.artifact import Bundle, BundleError
from export.paths import local_path, parse_settings
from serving.cli.options import DEFAULT_ENCODER, CollectionOptions
from serving.collection.columns import KIND_NAMES
from serving.collection.index import DEFAULT, Index, IndexProblem, WrongEncoder, existing_collections
from serving.indexing.fill import Tally, batch_encoder, fill, write_skipped
from serving.indexing.originals import absolute, indexed_originals, open_originals
from serving.indexing.reembed import reembed
from serving.indexing.sync import gone
from serving.inference.encoder import find_bundle
from serving.limits import SettingProblem, lower_priority
from serving.protocol.filters import Filter
from serving.protocol.shown import counted
from training.data.sources import DataError, none_readable


@dataclass(frozen=True, kw_only=True)
class BulkSettings(CollectionOptions):
    data: str | None = None
    """A folder of images, a .zip of one, WebDataset shards ('shards/*.tar'), hf:NAME for a data set of Hugging
    Face, a torchvision name (cifar10, cifar100, stl10, ...), a .parquet with a column path or image, or shapes: the
    built-in set of images."""
    encoder: str | None = DEFAULT_ENCODER
    """An encoder bundle's folder, or a tag of BentoML's model store. Default: the first in TWINVIEW_ENCODER, or under
    runs/ the newest one that has embedded the collection; of a new collection, and to re-embed, the newest of all."""
    split: Literal["all", "train", "test"] = "all"
    """The split to read, if the data has several."""
    watch: bool = False
    """Follow the folder: files that are added, changed or removed are updated in the index within seconds. Ctrl-C ends
    it."""
    sync: bool = False
    """Also remove the pictures of the folder --data whose files are no longer there."""
    reembed: bool = False
    """Embed with another encoder, whose vectors are stored in addition. Without --data, the pictures of the collection
    are read again: uploads from the index, others from their paths."""
    without_skipped: bool = False
    """With --reembed: let services use the new encoder even if pictures had to be skipped."""
    pictures: tuple[str, ...] = ()
    """More folders in which a Parquet list, or a collection that is embedded again, may name files. No others are read.
    The list's own folder, and the folders that the collection was filled from, need not be given."""
    ray: bool = False
    """Distribute the work over a Ray cluster (install twinview[ray]). All machines must reach data and index at the
    same path."""


def run(settings: BulkSettings) -> Tally:
    """raises DataError, BundleError, IndexProblem; KeyboardInterrupt after storing what is done"""
    _check(settings)
    bundle = find_bundle(settings.encoder, used=() if settings.reembed else _encoders(settings))
    index = Index(settings.index, bundle.card.id, bundle.card.dimension, settings.collection)
    _check_index_outside(settings.data, index)
    known = _known_ids(settings, index)
    tally = Tally()
    if settings.watch:
        from serving.indexing.follow import follow

        index.add_folders(absolute([settings.data or ""]))
        follow(local_path(settings.data or ""), batch_encoder(bundle), index, _skipped_path(index))
        return tally
    if settings.reembed and settings.data is None and not settings.ray:
        return _embed_again(settings, bundle, index)
    if settings.reembed and settings.data is None:
        folders = _folders(settings, bundle)
        originals, source = indexed_originals(_fullest(settings, bundle), folders), f"the collection {index.name}"
    else:
        originals, source = open_originals(settings.data, settings.split, settings.pictures), settings.data
    _check_kinds(originals.kinds, index)
    for note in originals.notes:
        print(f"columns {note}")
    index.add_folders(originals.folders)
    target = settings.index if index.name == DEFAULT else f"{settings.index}, collection {index.name}"
    print(f"embedding {counted(originals.count)} of {source} with {bundle.card.id} into {target}")
    try:
        if settings.ray:
            from serving.indexing.cluster import fill_by_ray

            with index.filling():
                fill_by_ray(originals, bundle, index, tally, known, settings.reembed)
        else:
            with index.one_change() as whole:
                encoder, again = batch_encoder(bundle), settings.reembed
                fill(originals.files, originals.count, encoder, whole, tally, known, again, note_ids=True)
                _tell_gone(settings, whole, tally)
    except KeyboardInterrupt:
        print(f"interrupted: {tally}; run the same command again to resume")
        raise
    index.maintain()
    _tell(tally, index)
    if tally.skipped and not tally.indexed + tally.present:
        raise none_readable(tally.skipped, str(source))
    return tally


def _embed_again(settings: BulkSettings, bundle: Bundle, index: Index) -> Tally:
    """Embeds what other encoders have embedded. Raises as `run`."""
    folders, tally = _folders(settings, bundle), Tally()
    index.add_folders(folders)
    print(f"embedding the collection {index.name} in {settings.index} again with {bundle.card.id}")
    try:
        progress = reembed(index, batch_encoder(bundle), folders, tally, settings.without_skipped)
    except KeyboardInterrupt:
        print(f"interrupted: {tally}; run the same command again to resume")
        raise
    _tell(tally, index)
    if progress.state == "incomplete":
        print("a service uses the encoder before it until those are embedded too, or until --without-skipped is given")
    return tally


def _tell_gone(settings: BulkSettings, index: Index, tally: Tally) -> None:
    """Removes, or offers to remove, what is no longer in the folder."""
    data = settings.data or ""
    if settings.split != "all" or not os.path.isdir(local_path(data)):
        return
    ids = gone(index, local_path(data), tally.paths)
    pictures = f"{len(ids):,} pictures of {index.name} are" if len(ids) != 1 else f"1 picture of {index.name} is"
    if ids and settings.sync:
        index.delete(ids)
        print(f"{pictures} no longer in {data}, and removed; to bring them back: {_command('undo', settings)}")
    elif ids:
        print(f"{pictures} no longer in {data}; the same command with --sync removes them from the index")


def _tell(tally: Tally, index: Index) -> None:
    skipped = _skipped_path(index)
    write_skipped(skipped, tally.skipped)
    listed = f" (see {skipped})" if tally.skipped else ""
    print(f"{tally}{listed}; {index.name} holds {index.count():,}")


def command(settings: BulkSettings) -> Tally:
    """`run` at low priority, so that a service on the same machine stays fast."""
    lower_priority()
    return run(settings)


def _check(settings: BulkSettings) -> None:
    if settings.watch and (settings.ray or settings.reembed or settings.split != "all"):
        raise DataError("--watch cannot be combined with --ray, --reembed or --split: it follows a whole folder")
    if settings.sync and not os.path.isdir(local_path(settings.data or "")):
        raise DataError(f"--sync needs a folder, and {settings.data or 'no --data'} is not one")
    if settings.sync and (settings.ray or settings.split != "all"):
        raise DataError("--sync cannot be combined with --ray or --split: it compares with a whole folder")
    if settings.without_skipped and (not settings.reembed or settings.data or settings.ray):
        raise DataError("--without-skipped is for `index reembed`, without --data and --ray")
    if settings.watch and not os.path.isdir(local_path(settings.data or "")):
        raise DataError(f"--watch needs a folder, and {settings.data or 'no --data'} is not one")


def _check_index_outside(data: str | None, index: Index) -> None:
    folder, inside = local_path(data or ""), index.store.local
    if data and os.path.isdir(folder) and inside is not None:
        parts = Path(os.path.relpath(inside, folder)).parts
        if not any(part.startswith(".") for part in parts):  # hidden folders are not read
            raise DataError(f"the index {index.store.uri} is inside {data}, so its thumbnails would be indexed too")


def _check_kinds(kinds: Mapping[str, type], index: Index) -> None:
    """Raises IndexProblem, before any picture is embedded, for metadata of another type than the collection has."""
    known: Mapping[str, type] = {}
    with suppress(WrongEncoder):  # a new table, of another encoder
        known = index.keys()
    for key, kind in kinds.items():
        old = known.get(key, kind)
        if old is not kind and {old, kind} != {int, float} and index.count(Filter.parse({key: {"ne": None}})):
            raise IndexProblem(
                f"the column {key} holds {KIND_NAMES[kind]}, but the metadata {key} of the items of {index.name} is "
                f"{KIND_NAMES[old]}; rename the column"
            )


def _encoders(settings: BulkSettings) -> list[str]:
    """Ids of the encoders that have embedded the collection; none if it does not exist."""
    with suppress(IndexProblem):
        return [table.encoder_id for table in settings.tables()]
    return []


def _known_ids(settings: BulkSettings, index: Index) -> set[str]:
    """Raises WrongEncoder, which says what there is to choose from."""
    try:
        return index.ids()
    except WrongEncoder as error:
        if settings.reembed:
            return set()
        there = max(settings.tables(), key=lambda table: table.count())
        encoder = ["--encoder", settings.encoder] if settings.encoder else []
        raise WrongEncoder(
            f"{there.name} in {settings.index} has {counted(there.count(), 'item')} with vectors of "
            f"{there.encoder_id}, and this is {index.encoder_id}. Name another collection with --collection, or "
            f"another index with --index; or embed those items again too, before: "
            f"{_command('reembed', settings, *encoder)}"
        ) from error


def _command(name: str, settings: BulkSettings, *more: str) -> str:
    """Returns another command on the same collection, as it is typed in the current folder."""
    words = ("--index", settings.index, "--collection", settings.collection, *more)
    return f"twinview index {name} {shlex.join(words)}"


def _fullest(settings: BulkSettings, bundle: Bundle) -> Index:
    """Returns the largest table of another encoder. Raises DataError, IndexProblem."""
    tables = existing_collections(settings.index, settings.collection)
    others = [facts for facts in tables if facts.encoder != bundle.card.id]
    if not others:
        raise DataError(
            f"nothing to re-embed: the collection {settings.collection} in {settings.index} only holds vectors of "
            f"{bundle.card.id}"
        )
    return settings.open(max(others, key=lambda facts: facts.count))


def _folders(settings: BulkSettings, bundle: Bundle) -> list[str]:
    """Returns the folders with pictures of the collection. Raises DataError."""
    index = _fullest(settings, bundle)
    folders = list(dict.fromkeys([*index.folders(), *absolute(settings.pictures)]))
    if not folders and next(index.store.list(f"originals/{index.stored}"), None) is None:
        raise DataError(f"name the folders with the pictures of {settings.collection} with --pictures")
    return folders


def _skipped_path(index: Index) -> Path:
    return index.store.local / "skipped.csv" if index.store.local else Path(f"{index.name}.skipped.csv")


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends it like Ctrl-C
    try:
        command(parse_settings(BulkSettings, description=__doc__))
    except (DataError, BundleError, IndexProblem, SettingProblem, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
