"""Does the index keep what it has acknowledged when its writer is killed?

    python benchmarks/durability.py [--quick]

A process upserts, deletes and maintains, and says through a pipe what it begins and what has returned. It is killed by
SIGKILL at a random moment; then the collection is read anew and compared. What was under way may be there or not, but
as a whole. `lost` are acknowledged pictures that are not there, not as they were last written, or not found by a reader
that was open all the time; `back` are pictures that are there though their deletion was acknowledged; `half` are
operations of which a part is there; `unsound` is what `Index.verify` says. A killed process leaves the system's cache
of the disk as it is: a power cut is another matter, which tests/serving/test_index.py imitates.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.result import publish
from serving.collection.index import Index, Item, unit

DIMENSION = 32
PICTURES = 2000  # different ones
AT_ONCE = 150  # at most, of an upsert or a deletion
LONGEST_S = 0.8  # from the first acknowledgement to the kill
THUMBNAIL = b"\xff\xd8\xff\xd9"


@dataclass(frozen=True)
class Options:
    rounds: int = 100
    """Kills."""
    quick: bool = False
    """10 kills."""


@dataclass(frozen=True)
class Operation:
    what: str  # upsert, delete, maintain
    numbers: tuple[int, ...]
    edition: int  # what is written differs by it

    def applied(self, held: dict[int, int]) -> dict[int, int]:
        """The edition of each picture after it."""
        match self.what:
            case "upsert":
                return held | dict.fromkeys(self.numbers, self.edition)
            case "delete":
                return {number: edition for number, edition in held.items() if number not in self.numbers}
        return held


def main(options: Options) -> None:
    rounds = 10 if options.quick else options.rounds
    rng = np.random.default_rng(0)
    held: dict[int, int] = {}
    totals = dict.fromkeys(("operations", "maintained", "under way", "half", "unsound", "back", "lost"), 0)
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder, "index"))
        open_all_the_time = Index(uri, "encoder", DIMENSION)
        for turn in tqdm(range(rounds), disable=None):
            done, under_way = killed(uri, turn, float(rng.uniform(0, LONGEST_S)))
            for operation in done:
                held = operation.applied(held)
            totals["operations"] += len(done)
            totals["maintained"] += sum(operation.what == "maintain" for operation in done)
            totals["under way"] += under_way is not None
            found, wrong = read(Index(uri, "encoder", DIMENSION))
            after = held if under_way is None else under_way.applied(held)
            for name, value in differences(found, held, after).items():
                totals[name] += value
            totals["lost"] += wrong + missed(open_all_the_time, found, rng)
            said = Index(uri, "encoder", DIMENSION).verify()
            totals["unsound"] += len(said)
            for sentence in said:
                print(sentence)
            held = found
    publish(
        "durability",
        [{"kills": rounds, **totals}],
        {name: totals[name] for name in ("half", "unsound", "back", "lost")},
    )


def killed(uri: str, turn: int, after_s: float) -> tuple[list[Operation], Operation | None]:
    """What a writer that was killed had acknowledged, and what it had begun."""
    context = get_context("spawn")
    said, says = context.Pipe(duplex=False)
    process = context.Process(target=write, args=(uri, turn, says), daemon=True)
    process.start()
    says.close()
    done: list[Operation] = []
    under_way = None
    until = None
    while True:
        if until is None or time.monotonic() < until:
            if not said.poll(None if until is None else max(0, until - time.monotonic())):
                continue
        elif process.is_alive():
            process.kill()
            process.join()
        try:
            message = said.recv()
        except EOFError:
            return done, under_way
        if message is None:
            done.append(under_way)
            under_way = None
            until = until or time.monotonic() + after_s
        else:
            under_way = message


def write(uri: str, turn: int, says: Connection) -> None:
    index, rng = Index(uri, "encoder", DIMENSION), np.random.default_rng([1, turn])
    for count in range(10**6):
        what = str(rng.choice(["upsert", "delete", "maintain"], p=[0.6, 0.25, 0.15]))
        numbers = rng.choice(PICTURES, rng.integers(1, AT_ONCE), replace=False).tolist()
        operation = Operation(what, tuple(numbers), 10**6 * turn + count)
        says.send(operation)
        match what:
            case "upsert":
                pictures = [picture(number, operation.edition) for number in numbers]
                vectors = np.stack([vector(number, operation.edition) for number in numbers])
                index.upsert(pictures, vectors, {item.id: THUMBNAIL for item in pictures})
            case "delete":
                index.delete(f"{number:032x}" for number in numbers)
            case "maintain":
                index.maintain()
        says.send(None)


def picture(number: int, edition: int) -> Item:
    return Item(f"{number:032x}", f"{number}.jpg", None, None, 1, 1, 1, {"edition": edition})


def vector(number: int, edition: int) -> np.ndarray:
    return unit(np.random.default_rng([number, edition]).normal(size=(1, DIMENSION)))[0]


def read(index: Index) -> tuple[dict[int, int], int]:
    """The edition of each picture that is there, and how many are not what they should be or there twice."""
    found: dict[int, int] = {}
    wrong = 0
    for items, vectors in index.scan():
        for item, got in zip(items, vectors, strict=True):
            number, edition = int(item.id, 16), item.metadata["edition"]
            same = item == picture(number, edition) and np.allclose(got, vector(number, edition), atol=1e-6)
            wrong += number in found or not same
            found[number] = edition
    return found, wrong


def differences(found: dict[int, int], before: dict[int, int], after: dict[int, int]) -> dict[str, int]:
    """From `after`, or from `before` if that is nearer: what was under way may have happened or not."""
    touched = {number for number in before.keys() | after.keys() if before.get(number) != after.get(number)}
    happened = sum(found.get(number) == after.get(number) for number in touched)
    expected = after if happened else before
    neither = [number for number in touched if found.get(number) not in (before.get(number), after.get(number))]
    kept = [number for number in expected if number not in touched]
    return {
        "half": 0 < happened < len(touched),
        "back": len(found.keys() - expected.keys() - touched),
        "lost": len(neither) + sum(found.get(number) != expected[number] for number in kept),
    }


def missed(index: Index, found: dict[int, int], rng: np.random.Generator) -> int:
    """Of twenty pictures, how many are not the nearest to their own vectors."""
    some = rng.permutation(sorted(found))[:20].tolist()
    return sum(
        [item.metadata["edition"] for item, _ in index.search(vector(number, found[number]), 1)] != [found[number]]
        for number in some
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
