"""`twinview index export`, `import` and `copy`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from serving.cli.place import Place, Table
from serving.collection.index import DEFAULT, Index
from serving.protocol.filters import parse_shell


@dataclass(frozen=True, kw_only=True)
class Export(Table):
    output: Positional[Path]
    """A .parquet."""
    where: str | None = None
    """What must hold of the items: 'label=shirt price>=3 colour=red,blue', or JSON as the service takes it."""


def export(settings: Export) -> None:
    from serving.collection.exchange import FileProblem
    from serving.indexing import transfer

    if settings.output.suffix != ".parquet":
        raise FileProblem(f"{settings.output} must end in .parquet")
    which = parse_shell(settings.where) if settings.where else None
    count = transfer.export(settings.one(), settings.output, which)
    print(f"{count:,} items of {settings.collection} in {settings.output}")


@dataclass(frozen=True, kw_only=True)
class Import(Place):
    input: Positional[Path]
    """A .parquet of `twinview index export` or `twinview embed`."""
    collection: str | None = None
    """Its name; by default the one that the file names."""


def import_(settings: Import) -> None:
    """Thumbnails are made of pictures that still lie where they were."""
    from serving.collection import exchange
    from serving.indexing import transfer

    contents = exchange.contents(settings.input)
    name = settings.collection or contents.collection or DEFAULT
    target = Index(settings.index, contents.encoder, contents.dimension, name)
    sent = transfer.import_(contents, target)
    target.maintain()
    print(f"{sent}; {name} holds {target.count():,}")


@dataclass(frozen=True, kw_only=True)
class Copy:
    source: Positional[str]
    """A folder, or s3://bucket/prefix."""
    target: Positional[str]
    """Another."""
    collection: str | None = None
    """Its name; by default all."""


def copy(settings: Copy) -> None:
    from serving.indexing import transfer

    for source, target in transfer.pairs(settings.source, settings.target, settings.collection):
        sent = transfer.copy(source, target)
        target.maintain()
        print(f"{source.name} of {source.encoder_id}: {sent}; compared and equal")
