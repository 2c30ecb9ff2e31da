"""The index compared with FAISS: recall, latency, filters, writing, opening, memory, and searching during writes.

    python benchmarks/index.py [--quick]
    python benchmarks/index.py --real vectors.npy       vectors that `twinview embed` has written, minus their mean

The generated vectors are unit vectors around 2,000 centres, and so are the queries. `flat` is FAISS's exact
IndexFlatIP with one thread or all, whichever is faster; `hnsw` is its IndexHNSWFlat (M 32), for generated vectors.
Twinview, as collection.index on a folder, returns whole items, FAISS row numbers. They alternate query by query in one
process. Upserts are durable when they return. A filter is measured at its first use, and when used again on the same
version of the table.

`reopening` is a fresh process: from the end of its imports to the first answer, and from its start. `memory` is what it
then uses in addition to the imports, and in total. `fresh` is after the most new rows that are not in the vector index
yet, and `maintained` after they were added to it. `while loading` is the p99 of
searches while another process upserts, without a pause, as many rows at once as bulk.py writes at most, relative to
the p99 on an idle machine.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import faiss
import numpy as np
import psutil
import tyro

from benchmarks.result import publish
from serving.collection.index import Index, Item, unit
from serving.limits import cores, lower_priority
from serving.protocol.filters import Filter

K = 10
CENTRES = 2000
SPREAD = 0.7  # of vectors around their centre: two vectors of one centre have a cosine of 0.67
ROWS = 8192  # per upsert
MANY = 32  # queries per batch
FILTERS = {"1 %": Filter.parse({"label": "7"}), "50 %": Filter.parse({"even": True})}


@dataclass(frozen=True)
class Options:
    quick: bool = False
    """20,000 vectors only."""
    real: Path | None = None
    """A .npy file with vectors of pictures (n, d)."""


@dataclass(frozen=True)
class Case:
    n: int
    d: int
    queries: int
    hnsw: bool = True
    loading_s: float = 10

    @property
    def name(self) -> str:
        return f"{self.n}x{self.d}"


CASES = (Case(10_000, 512, 300), Case(1_000_000, 128, 100, hnsw=False), Case(100_000, 512, 300))
QUICK = (Case(20_000, 512, 100, loading_s=3),)


def main(options: Options) -> None:
    import lancedb  # noqa: F401  takes seconds, which would count in the first upsert

    rows, figures = [], {}
    if options.real:
        vectors = np.load(options.real).astype(np.float32)
        vectors = unit(vectors - vectors.mean(axis=0))
        chosen = np.random.default_rng(0).permutation(len(vectors))
        queries, vectors = vectors[chosen[:200]], vectors[chosen[200:]]
        measured = measure(Case(len(vectors), vectors.shape[1], len(queries), hnsw=False), vectors, queries, rows)
    else:
        for case in QUICK if options.quick else CASES:
            measured = measure(case, *clustered(case), rows)
            figures |= {f"{name}_{case.name}": value for name, value in measured.items()}
    last = ("recall_at_10", "query_p50_over_faiss_flat")
    figures |= {name: value for name, value in measured.items() if name not in last}
    publish("index", rows, figures | {name: measured[name] for name in last})


def measure(case: Case, vectors: np.ndarray, queries: np.ndarray, rows: list[dict]) -> dict[str, float]:
    """Figures of one case; appends the rows of the table to `rows`."""
    print(case.name, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder, "index"))
        index = Index(uri, "encoder", case.d)
        figures = {"insert_rows_per_s": fill(index, vectors)}
        began = time.perf_counter()
        index.maintain()
        figures["maintain_s"] = time.perf_counter() - began
        figures |= measure_opening(uri, queries[0])
        figures |= compare_with_faiss(case, index, vectors, queries, rows)
        figures |= measure_fresh_rows(case, index, vectors, queries)
        figures |= measure_while_loading(case, index, queries)
    rows += [{"vectors": case.name, "what": name, "value": value} for name, value in figures.items()]
    return figures


def clustered(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, d) and queries (q, d)."""
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((CENTRES, case.d), dtype=np.float32))

    def draw(n: int) -> np.ndarray:
        around = rng.standard_normal((n, case.d), dtype=np.float32) * (SPREAD * case.d**-0.5)
        return unit(around + centres[rng.integers(0, CENTRES, n)])

    return draw(case.n), draw(case.queries)


def items(numbers: Sequence[int]) -> list[Item]:
    return [
        Item(f"{i:032x}", f"picture {i}.jpg", str(i % 100), f"/p/{i}.jpg", *sides(i), {"even": i % 2 == 0})
        for i in numbers
    ]


def sides(i: int) -> tuple[int, int, int]:
    """Width, height and bytes, different for each picture."""
    width, height = 200 + i * 7919 % 4000, 200 + i * 104_729 % 3000
    return width, height, width * height // 7


def fill(index: Index, vectors: np.ndarray) -> float:
    """Fill the index; returns rows per second."""
    seconds = 0.0
    for at in range(0, len(vectors), ROWS):
        batch = items(range(at, min(at + ROWS, len(vectors))))
        began = time.perf_counter()
        index.upsert(batch, vectors[at : at + ROWS])
        seconds += time.perf_counter() - began
    return len(vectors) / seconds


def measure_opening(uri: str, query: np.ndarray) -> dict[str, float]:
    """Time to open the index in a new process, and its memory."""
    began = time.time()
    with get_context("spawn").Pool(1) as pool:
        opened, answered, before, after = pool.apply(_reopen, (uri, query))
    times = {"reopening_s": answered - opened, "reopening_with_start_and_imports_s": answered - began}
    memory = {"memory_beyond_imports_mib": after - before, "memory_mib": after}
    return times | {name: value / 2**20 for name, value in memory.items()}


def _reopen(uri: str, query: np.ndarray) -> tuple[float, float, int, int]:
    """Time after the imports and at the first answer; bytes in use after the imports, and after more searches."""
    import lancedb  # noqa: F401  as the service does at its start

    process = psutil.Process()
    before, opened = process.memory_info().rss, time.time()
    index = Index(uri, "encoder", len(query))
    index.search(query, K)
    answered = time.time()
    for _ in range(100):
        index.search(query, K)
    return opened, answered, before, process.memory_info().rss


def compare_with_faiss(case: Case, index: Index, vectors: np.ndarray, queries: np.ndarray, rows: list[dict]) -> dict:
    flat = faiss.IndexFlatIP(case.d)
    flat.add(vectors)
    engines: dict[str, Callable] = {"twinview": lambda query: numbers(index.search(query, K))}
    engines["flat"] = lambda query: flat.search(query[None], K)[1][0]
    if case.hnsw:
        hnsw = faiss.IndexHNSWFlat(case.d, 32, faiss.METRIC_INNER_PRODUCT)
        hnsw.hnsw.efSearch = 64
        hnsw.add(vectors)
        engines["hnsw"] = lambda query: hnsw.search(query[None], K)[1][0]
    truth = flat.search(queries, K)[1]
    faster_threads(lambda: [engines["flat"](query) for query in queries[:20]])
    took = in_turns(engines, queries)
    p50 = {name: float(np.median(times)) for name, times in took.items()}
    for name, engine in engines.items():
        found = recall([engine(query) for query in queries], truth)
        row = {"vectors": case.name, "what": "query", "engine": name, "p50 ms": 1e3 * p50[name], "recall": found}
        rows.append(row | {"p99 ms": 1e3 * float(np.percentile(took[name], 99)), "over flat": p50[name] / p50["flat"]})
    figures = {
        "recall_at_10": rows[-len(engines)]["recall"],
        "query_p50_over_faiss_flat": p50["twinview"] / p50["flat"],
    }

    batches = {"twinview": lambda batch: index.search_many(batch, K), "flat": lambda batch: flat.search(batch, K)}
    took = in_turns(batches, np.array_split(queries, len(queries) // MANY))
    for name, times in took.items():
        each = float(np.median(times)) / MANY
        rows.append({"vectors": case.name, "what": f"each of {MANY}", "engine": name, "p50 ms": 1e3 * each})
        rows[-1] |= {"over one": each / p50[name]}
    figures["batch_query_over_one"] = rows[-2]["over one"]

    labels = np.arange(case.n)
    for name, kept in (("1 %", labels % 100 == 7), ("50 %", labels % 2 == 0)):
        kept = np.flatnonzero(kept)
        truth = kept[np.argsort(-(queries @ vectors[kept].T), axis=1)[:, :K]]
        met: list[float] = []
        found = []
        for query in queries:
            began = time.perf_counter()
            found.append(numbers(index.search(query, K, FILTERS[name])))
            met.append(time.perf_counter() - began)
        row = {
            "vectors": case.name,
            "what": f"filter {name}",
            "engine": "twinview",
            "p50 ms": 1e3 * float(np.median(met)),
        }
        rows.append(row | {"first ms": 1e3 * met[0], "recall": recall(found, truth)})
        figures[f"recall_filter_{name.split()[0]}_percent"] = rows[-1]["recall"]
    return figures


def measure_fresh_rows(case: Case, index: Index, vectors: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """Searches when a number of new rows are not in the vector index yet, and the first one after maintenance."""
    new = unit(vectors[: index.rows_per_maintenance] + np.float32(0.01))
    index.upsert(items(range(case.n, case.n + len(new))), new)
    figures = {"fresh_first_ms": 1e3 * search_s(index, queries[0])}
    truth = np.argsort(-(queries @ np.concatenate([vectors, new]).T), axis=1)[:, :K]
    met = [search_s(index, query) for query in queries]
    found = [numbers(index.search(query, K)) for query in queries]
    figures |= {"fresh_p50_ms": 1e3 * float(np.median(met)), "fresh_recall_at_10": recall(found, truth)}
    index.maintain()
    figures["maintained_first_ms"] = 1e3 * search_s(index, queries[0])
    index.delete(f"{i:032x}" for i in range(case.n, case.n + len(new)))
    return figures


def measure_while_loading(case: Case, index: Index, queries: np.ndarray) -> dict[str, float]:
    """p99 of searches while another process upserts, relative to the idle p99; and rows upserted per second."""
    idle = [search_s(index, query) for query in np.resize(queries, (max(300, len(queries)), case.d))]
    context = get_context("spawn")
    stop, count = context.Event(), context.Value("q", 0)
    writer = context.Process(target=_load, args=(index.store.uri, case, stop, count), daemon=True)
    writer.start()
    while not count.value:
        time.sleep(0.01)
    busy, before, began, at = [], count.value, time.perf_counter(), 0
    while time.perf_counter() - began < case.loading_s:
        busy.append(search_s(index, queries[at % len(queries)]))
        at += 1
    seconds = time.perf_counter() - began
    rate = (count.value - before) / seconds
    stop.set()
    writer.join()
    p99 = {name: 1e3 * float(np.percentile(times, 99)) for name, times in (("idle", idle), ("busy", busy))}
    figures = {"p99_idle_ms": p99["idle"], "p99_while_loading_ms": p99["busy"], "loaded_rows_per_s": rate}
    return figures | {"p99_while_loading_over_idle": p99["busy"] / p99["idle"]}


def _load(uri: str, case: Case, stop: Event, count: Synchronized) -> None:
    from serving.indexing.fill import MAX_ROWS_PER_UPSERT

    lower_priority()  # like `twinview index add`, which writes at most this many rows at once
    index, vectors = Index(uri, "encoder", case.d), clustered(Case(MAX_ROWS_PER_UPSERT, case.d, 1))[0]
    while not stop.is_set():
        at = case.n + count.value
        index.upsert(items(range(at, at + len(vectors))), vectors)
        count.value += len(vectors)


def in_turns(engines: dict[str, Callable], queries: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Seconds of each query, with the engines alternating, after a warm-up."""
    for engine in engines.values():
        engine(queries[0])
    times: dict[str, list[float]] = {name: [] for name in engines}
    for query in queries:
        for name, engine in engines.items():
            began = time.perf_counter()
            engine(query)
            times[name].append(time.perf_counter() - began)
    return times


def search_s(index: Index, query: np.ndarray) -> float:
    """Seconds of one search."""
    began = time.perf_counter()
    index.search(query, K)
    return time.perf_counter() - began


def faster_threads(work: Callable) -> None:
    """Set FAISS to one thread or all, whichever is faster."""
    seconds = {}
    for threads in (1, cores()):
        faiss.omp_set_num_threads(threads)
        work()
        began = time.perf_counter()
        work()
        seconds[threads] = time.perf_counter() - began
    faiss.omp_set_num_threads(min(seconds, key=seconds.get))


def numbers(found: list[tuple[Item, float]]) -> list[int]:
    return [int(item.id, 16) for item, _ in found]


def recall(found: Sequence[Sequence[int]], truth: np.ndarray) -> float:
    return float(
        np.mean([len({*rows} & {*right.tolist()}) / len(right) for rows, right in zip(found, truth, strict=True)])
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
