"""`twinview pick`: lists the pictures of a collection that should be labelled first."""

from dataclasses import dataclass
from pathlib import Path

from serving.cli.options import TableOptions
from serving.cli.table import write_table
from serving.collection.problems import IndexProblem
from serving.curation.items import NoValues
from serving.curation.pick_items import pick_items
from serving.protocol.filters import parse_shell
from serving.protocol.queries import PickMethod

COLUMNS = ("id", "name", "path", "label")


@dataclass(frozen=True, kw_only=True)
class PickSettings(TableOptions):
    """List the pictures of a collection that should be labelled first."""

    k: int = 30
    """Number of pictures."""
    method: PickMethod = "central"
    """central: the middle of each of k clusters. typical: where pictures are densest in each cluster (TypiClust).
    covering: those that have most others around them (ProbCover). diverse: as different as possible (k-centre)."""
    balanced_by: str | None = None
    """A metadata key, or label: pick as many pictures of each of its values, as far as there are enough."""
    where: str | None = None
    """Pick only from these: 'year>=2020 colour=red,blue', or JSON as in the HTTP API."""
    labelled_too: bool = False
    """Pick also pictures that have a label; otherwise they are left out, and so are pictures like them."""
    seed: int = 0
    """Seed of the clusters."""
    output: Path = Path("to_label.csv")
    """A CSV file with the id, name, path and label of each picture, the most useful ones first. Fill in the labels."""


def run(settings: PickSettings) -> int:
    """Returns the number of pictures. Raises IndexProblem, FilterProblem."""
    if settings.k < 1:
        raise IndexProblem(f"--k {settings.k}: must be 1 or more")
    if settings.output.exists():
        raise IndexProblem(f"--output: {settings.output} exists, and may hold labels; name another file")
    index = settings.chosen_table()
    where = parse_shell(settings.where) if settings.where else None
    try:
        picked = pick_items(
            index, settings.k, settings.method, where, settings.balanced_by, settings.labelled_too, settings.seed
        )
    except NoValues as error:
        key = settings.balanced_by
        raise IndexProblem(f"--balanced-by {key}: no picture of {settings.collection} has a value of {key}") from error
    if not picked.found:
        raise IndexProblem(f"{settings.collection} has no pictures" + (f" with {settings.where}" if where else ""))
    if not picked.candidates:
        raise IndexProblem(
            f"all {picked.found:,} pictures of {settings.collection} have a label; --labelled-too picks from them"
        )
    write_table(settings.output, COLUMNS, [(item.id, item.name, item.path, item.label) for item in picked.items])
    without = "" if settings.labelled_too else " without a label"
    print(
        f"picked {len(picked.items):,} of {picked.candidates:,} pictures of {settings.collection}{without}, listed in "
        f"{settings.output}"
    )
    return len(picked.items)
