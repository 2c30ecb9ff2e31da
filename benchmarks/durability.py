"""Whether the index keeps every acknowledged write when its writer is killed.

    python benchmarks/durability.py [--quick]

A process upserts, deletes and maintains, and reports through a pipe each operation before it starts and after it has
returned. It is killed by SIGKILL at a random moment; then the collection is read again and compared. The operation in
progress may have happened or not, but not in part. The counts are

    lost     acknowledged pictures that are missing, differ from what was last written, or are not found by a reader
             that was open all the time
    back     pictures that exist although their deletion was acknowledged
    half     operations that happened in part
    unsound  problems found by `Index.verify`

A killed process does not lose the system's disk cache. Power cuts are imitated in tests/serving/test_index.py.
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
PICTURES = 2000  # different pictures
AT_ONCE = 150  # most pictures of an upsert or a deletion
LONGEST_S = 0.8  # longest time from the first acknowledgement to the kill
THUMBNAIL = b"\xff\xd8\xff\xd9"


@dataclass(frozen=True)
class Options:
    rounds: int = 100
    """Number of kills."""
    quick: bool = False
    """10 kills only."""


@dataclass(frozen=True)
class Operation:
    what: str  # upsert, delete, maintain
    numbers: tuple[int, ...]
    edition: int  # a number that makes the written content unique

    def applied(self, held: dict[int, int]) -> dict[int, int]:
        """The edition of each picture after the operation."""
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
        long_open_reader = Index(uri, "encoder", DIMENSION)
        for turn in tqdm(range(rounds), disable=None):
            done, under_way = run_and_kill(uri, turn, float(rng.uniform(0, LONGEST_S)))
            for operation in done:
                held = operation.applied(held)
            totals["operations"] += len(done)
            totals["maintained"] += sum(operation.what == "maintain" for operation in done)
            totals["under way"] += under_way is not None
            found, wrong = read(Index(uri, "encoder", DIMENSION))
            after = held if under_way is None else under_way.applied(held)
            for name, value in differences(found, held, after).items():
                totals[name] += value
            totals["lost"] += wrong + missed(long_open_reader, found, rng)
            problems = Index(uri, "encoder", DIMENSION).verify()
            totals["unsound"] += len(problems)
            for problem in problems:
                print(problem)
            held = found
    publish(
        "durability",
        [{"kills": rounds, **totals}],
        {name: totals[name] for name in ("half", "unsound", "back", "lost")},
    )


def run_and_kill(uri: str, turn: int, after_s: float) -> tuple[list[Operation], Operation | None]:
    """Run a writer and kill it; returns the operations that it acknowledged, and the one in progress."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=write, args=(uri, turn, sender), daemon=True)
    process.start()
    sender.close()
    done: list[Operation] = []
    under_way = None
    until = None
    while True:
        if until is None or time.monotonic() < until:
            if not receiver.poll(None if until is None else max(0, until - time.monotonic())):
                continue
        elif process.is_alive():
            process.kill()
            process.join()
        try:
            message = receiver.recv()
        except EOFError:
            return done, under_way
        if message is None:
            done.append(under_way)
            under_way = None
            until = until or time.monotonic() + after_s
        else:
            under_way = message


def write(uri: str, turn: int, sender: Connection) -> None:
    """Send each operation before it starts, and None after it has returned, until this process is killed."""
    index, rng = Index(uri, "encoder", DIMENSION), np.random.default_rng([1, turn])
    for count in range(10**6):
        what = str(rng.choice(["upsert", "delete", "maintain"], p=[0.6, 0.25, 0.15]))
        numbers = rng.choice(PICTURES, rng.integers(1, AT_ONCE), replace=False).tolist()
        operation = Operation(what, tuple(numbers), 10**6 * turn + count)
        sender.send(operation)
        match what:
            case "upsert":
                pictures = [picture(number, operation.edition) for number in numbers]
                vectors = np.stack([vector(number, operation.edition) for number in numbers])
                index.upsert(pictures, vectors, {item.id: THUMBNAIL for item in pictures})
            case "delete":
                index.delete(f"{number:032x}" for number in numbers)
            case "maintain":
                index.maintain()
        sender.send(None)


def picture(number: int, edition: int) -> Item:
    return Item(f"{number:032x}", f"{number}.jpg", None, None, 1, 1, 1, {"edition": edition})


def vector(number: int, edition: int) -> np.ndarray:
    return unit(np.random.default_rng([number, edition]).normal(size=(1, DIMENSION)))[0]


def read(index: Index) -> tuple[dict[int, int], int]:
    """The edition of each existing picture, and how many pictures are wrong or exist twice."""
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
    """Differences of `found` from `after`, or from `before` if the operation in progress did not happen."""
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
    """How many of twenty random pictures a search for their own vector does not find."""
    sample = rng.permutation(sorted(found))[:20].tolist()
    return sum(
        [item.metadata["edition"] for item, _ in index.search(vector(number, found[number]), 1)] != [found[number]]
        for number in sample
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
