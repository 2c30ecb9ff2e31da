"""Overhead of kNN evaluation over its arithmetic: the product of queries and bank, and the k greatest per row.

    python benchmarks/knn.py

The two alternate on the same random features; the figure is the ratio of their medians. Memory is the growth of the
process's peak in the first evaluation; all similarities at once would take 2 GB.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import resource
import time
from dataclasses import dataclass
from statistics import median

import torch
import tyro

from benchmarks.result import publish
from training.evaluation.knn import knn_predict

CLASSES, ROWS = 10, 1024  # classes; queries per matrix product


@dataclass(frozen=True)
class Options:
    bank: int = 50_000
    """Pictures in the bank."""
    queries: int = 10_000
    """Pictures that are classified."""
    dimension: int = 512
    """Length of h."""
    k: int = 200
    """Neighbours."""
    turns: int = 3
    """Repetitions."""
    quick: bool = False
    """A tenth of the bank and of the queries."""


def main(options: Options) -> None:
    shrunk = 10 if options.quick else 1
    generator = torch.Generator().manual_seed(0)
    bank, queries = (
        torch.nn.functional.normalize(torch.randn(n // shrunk, options.dimension, generator=generator), dim=1)
        for n in (options.bank, options.queries)
    )
    labels = torch.randint(0, CLASSES, (len(bank),), generator=generator)

    def bare() -> None:
        for rows in queries.split(ROWS):
            (rows @ bank.T).topk(options.k, dim=1)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    knn_predict(bank, labels, queries, options.k)
    extra_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    bare()
    seconds: dict[str, list[float]] = {"evaluation": [], "product and top-k": []}
    for _ in range(options.turns):
        for times, run in zip(
            seconds.values(), (lambda: knn_predict(bank, labels, queries, options.k), bare), strict=True
        ):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    rows = [{"bank": len(bank), "queries": len(queries), "what": name, "s": median(s)} for name, s in seconds.items()]
    ratio = rows[0]["s"] / rows[1]["s"]
    publish("knn", rows, {"extra_mib": extra_mib, "knn_over_bare": ratio})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
