"""Compares a quantised graph with its original: differences on pictures, and speed."""

import time

import numpy as np
import torch
import torch.nn.functional as F
from onnxruntime import InferenceSession, SessionOptions
from torch import Tensor
from tqdm import tqdm

from training.data.store import PixelStore
from training.evaluation import retrieval
from training.evaluation.knn import default_k, knn_predict, split_bank_and_queries

NEIGHBOURS = 10
BATCH = 32
ROUNDS = 9


class GraphComparison:
    """How much a graph differs from the original on the same pictures."""

    def __init__(self, graph: bytes, train: PixelStore, test: PixelStore | None, limit: int):
        """limit: most pictures to compare; with labels, up to a fifth as many kNN queries."""
        self.queries: np.ndarray | None = None
        if len(np.unique(train.labels[train.labels >= 0])) > 1:
            self.rows, query_store, self.queries = split_bank_and_queries(train, test, limit)
            self.query_pixels, self.query_labels = (
                query_store.pixels,
                torch.from_numpy(query_store.labels[self.queries]),
            )
        else:
            self.rows = np.sort(np.random.default_rng(0).permutation(len(train))[:limit])
        self.pixels, self.labels = train.pixels, torch.from_numpy(train.labels[self.rows])
        self.original = self._evaluate(graph)

    def __call__(self, graph: bytes) -> dict:
        """neighbours_kept: share of each picture's 10 nearest by the original that are among its 10 nearest now.

        With labels also knn, knn_original and knn_loss; for a classifier same_class, the share of equal classes.
        """
        before, now = self.original, self._evaluate(graph)
        k = min(NEIGHBOURS, len(self.rows) - 1)
        nearest = [retrieval.nearest(result["h"], result["h"], k, exclude_self=True)[1] for result in (before, now)]
        same = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(dim=2).float().mean().item()
        cosine = F.cosine_similarity(before["h"], now["h"]).mean().item()
        lost = {"pictures": len(self.rows), "neighbours_kept": same, "mean_cosine": cosine}
        if self.queries is not None:
            lost |= {"asked": len(self.queries), "knn_original": before["knn"], "knn": now["knn"]}
            lost["knn_loss"] = before["knn"] - now["knn"]
        if "class" in now:
            lost["same_class"] = (before["class"] == now["class"]).float().mean().item()
        return lost

    def _evaluate(self, graph: bytes) -> dict:
        session = open_graph(graph)
        h, logits = _outputs(session, self.pixels, self.rows)
        result: dict = {"h": h} if logits is None else {"h": h, "class": logits.argmax(dim=1)}
        if self.queries is not None:
            queries, _ = _outputs(session, self.query_pixels, self.queries)
            predicted = knn_predict(h, self.labels, queries, default_k(len(h)))
            result["knn"] = (predicted == self.query_labels).float().mean().item()
        return result


def images_per_s(graphs: dict[str, bytes], size_px: int) -> dict[str, float]:
    """Speed of each graph on all cores: the fastest of several batches, since other load only makes batches slower."""
    sessions = {name: open_graph(graph) for name, graph in graphs.items()}
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, size_px, size_px, 3), dtype=np.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(ROUNDS + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(["embedding"], {"pixels": pixels})
            if turn:  # the first turn is a warm-up
                seconds[name].append(time.perf_counter() - started)
    return {name: BATCH / min(times) for name, times in seconds.items()}


def open_graph(graph: bytes, threads: int = 0) -> InferenceSession:
    """A session on the CPU with this many threads; 0: all cores."""
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # spinning threads would slow down the next session
    return InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _outputs(session: InferenceSession, pixels: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """h (n, d), and a classifier's logits (n, C)."""
    batches = np.array_split(rows, -(-len(rows) // BATCH))
    outputs = [session.run(None, {"pixels": pixels[batch]}) for batch in tqdm(batches, desc="comparing", leave=False)]
    h, *logits = (torch.from_numpy(np.concatenate(output)) for output in zip(*outputs, strict=True))
    return h, logits[0] if logits else None
