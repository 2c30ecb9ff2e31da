"""Latency of a search over many shards, which waits for the slowest of them.

    python benchmarks/fanout.py

One shard, an Index on this machine's disk, is searched at a steady rate, and its latencies are recorded. A search over
S shards is simulated as the maximum of S latencies drawn from them. With hedged requests, a shard that has not answered
by its 95th percentile is also asked at a second replica, and the first answer counts (Dean and Barroso 2013, The Tail
at Scale). Shards are assumed independent; a network, a slow machine, or shards on the same machine would add latency.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tempfile
import time
from dataclasses import dataclass

import numpy as np
import tyro

from benchmarks.duplicates import clustered
from benchmarks.result import publish
from serving.collection.index import Index, Item

SHARDS = (1, 10, 100, 1000)
DRAWN = 20_000  # simulated searches
HEDGE_AT = 0.95  # quantile of the latency
LOAD = 0.5  # share of the rate of back-to-back searches
K = 10


@dataclass(frozen=True)
class Options:
    rows: int = 100_000
    """Vectors in the shard."""
    dimension: int = 512
    """Length of the vectors."""
    searches: int = 3000
    """Number of searches to measure."""
    quick: bool = False
    """10,000 vectors and 400 searches only."""


def main(options: Options) -> None:
    n, searches = (10_000, 400) if options.quick else (options.rows, options.searches)
    vectors = clustered(n + searches, options.dimension, -0.5)
    with tempfile.TemporaryDirectory() as folder:
        index = Index(folder, "measured", options.dimension)
        for start in range(0, n, 20_000):
            numbers = range(start, min(start + 20_000, n))
            items = [Item(f"{i:032x}", f"{i}.jpg", None, None, 1, 1) for i in numbers]
            index.upsert(items, vectors[start : numbers.stop])
        index.maintain()
        latency = measure_latencies(index, vectors[n:])
    rng = np.random.default_rng(0)
    rows = []
    for shards in SHARDS:
        for hedged in (False, True):
            waited = simulate(latency, shards, hedged, rng)
            p50, p99 = np.quantile(waited, (0.5, 0.99)) * 1000
            rows.append(
                {
                    "shards": shards,
                    "hedged": "yes" if hedged else "no",
                    "p50 (ms)": p50,
                    "p99 (ms)": p99,
                    "p99 / p50": p99 / p50,
                    "p50 / one shard's": p50 / (np.median(latency) * 1000),
                    "more work": 1 - HEDGE_AT if hedged else 0.0,
                }
            )
    at_100 = {row["hedged"]: row for row in rows if row["shards"] == 100}
    figures = {
        "p50_ms": float(np.median(latency) * 1000),
        "p99_over_p50_at_100_shards_hedged": at_100["yes"]["p99 / p50"],
        "p99_over_p50_at_100_shards": at_100["no"]["p99 / p50"],
    }
    publish("fanout", rows, figures)


def measure_latencies(index: Index, queries: np.ndarray) -> np.ndarray:
    """Seconds of each search, (n,), from the time it was due, so that delays by the search before it count."""
    for query in queries[:50]:
        index.search(query, K)
    started = time.perf_counter()
    for query in queries[:50]:
        index.search(query, K)
    gap = (time.perf_counter() - started) / 50 / LOAD
    latency, due = [], time.perf_counter()
    for query in queries:
        time.sleep(max(0.0, due - time.perf_counter()))
        index.search(query, K)
        latency.append(time.perf_counter() - due)
        due += gap
    return np.array(latency)


def simulate(latency: np.ndarray, shards: int, hedged: bool, rng: np.random.Generator) -> np.ndarray:
    """Seconds of each of DRAWN searches until the slowest shard has answered."""
    late = np.quantile(latency, HEDGE_AT)
    waited = np.empty(DRAWN)
    for start in range(0, DRAWN, 1000):
        first = rng.choice(latency, (1000, shards))
        if hedged:
            first = np.minimum(first, late + rng.choice(latency, first.shape))
        waited[start : start + 1000] = first.max(axis=1)
    return waited


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
