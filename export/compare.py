"""A graph beside the one that it was made of: what is lost, and how fast either is."""

import time
from collections.abc import Sequence

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from training.data.store import PixelStore
from training.evaluation import retrieval
from training.evaluation.knn import default_k, knn_predict

NEIGHBOURS = 10
ASKED = 0.2  # of the most pictures that are compared
BATCH = 32
ROUNDS = 9


class Judge:
    """What a graph loses against the original on the same pictures."""

    def __init__(self, graph: bytes, train: PixelStore, test: PixelStore | None, limit: int):
        order = np.random.default_rng(0).permutation(len(train))[:limit]
        self.rows, self.asked = np.sort(order), None
        labelled = self.rows[train.labels[self.rows] >= 0]
        if len(np.unique(train.labels[labelled])) > 1:
            if test is not None:
                some = np.flatnonzero(test.labels >= 0)
                self.rows, self.asked, asked_of = labelled, np.random.default_rng(0).permutation(some), test
            else:
                mixed = np.random.default_rng(0).permutation(labelled)
                self.asked, self.rows = np.split(mixed, [max(1, len(mixed) // 10)])
                asked_of = train
            self.asked = np.sort(self.asked[: max(1, int(ASKED * limit))])
            self.asked_pixels, self.asked_labels = asked_of.pixels, torch.from_numpy(asked_of.labels[self.asked])
        self.pixels, self.labels = train.pixels, torch.from_numpy(train.labels[self.rows])
        self.original = self._see(graph)

    def __call__(self, graph: bytes) -> dict:
        """neighbours_kept: share of each picture's 10 nearest by the original that are among its 10 nearest now.

        With labels also knn, knn_original and knn_loss; of a classifier, same_class: the share of equal answers.
        """
        new = self._see(graph)
        k = min(NEIGHBOURS, len(self.rows) - 1)
        places = [retrieval.nearest(seen["h"], seen["h"], k, own=True)[1] for seen in (self.original, new)]
        same = (places[0][:, :, None] == places[1][:, None, :]).any(dim=2).float().mean().item()
        cosine = F.cosine_similarity(self.original["h"], new["h"]).mean().item()
        lost = {"pictures": len(self.rows), "neighbours_kept": same, "mean_cosine": cosine}
        if "knn" in new:
            before, now = self.original["knn"], new["knn"]
            lost |= {"asked": len(self.asked), "knn_original": before, "knn": now, "knn_loss": before - now}
        if "class" in new:
            lost["same_class"] = (self.original["class"] == new["class"]).float().mean().item()
        return lost

    def _see(self, graph: bytes) -> dict:
        session = open_graph(graph)
        h, logits = _outputs(session, self.pixels, self.rows)
        seen = {"h": h} if logits is None else {"h": h, "class": logits.argmax(dim=1)}
        if self.asked is not None:
            asked, _ = _outputs(session, self.asked_pixels, self.asked)
            guess = knn_predict(h, self.labels, asked, default_k(len(h)))
            seen["knn"] = (guess == self.asked_labels).float().mean().item()
        return seen


def images_per_s(graphs: dict[str, bytes], size_px: int) -> dict[str, float]:
    """Of each, in turns on all cores of this machine, by the fastest of some batches: others may be at work here."""
    sessions = {name: open_graph(graph) for name, graph in graphs.items()}
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, size_px, size_px, 3), dtype=np.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(ROUNDS + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(["embedding"], {"pixels": pixels})
            if turn:  # the first is for warming up
                seconds[name].append(time.perf_counter() - started)
    return {name: BATCH / min(times) for name, times in seconds.items()}


def open_graph(graph: bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    """On the CPU, with as many threads; 0 for all cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow down whoever is next
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _outputs(session: onnxruntime.InferenceSession, pixels, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """h (n, d), and logits (n, C) where there are classes."""
    batches = np.array_split(rows, -(-len(rows) // BATCH))
    found = [session.run(None, {"pixels": pixels[some]}) for some in tqdm(batches, desc="comparing", leave=False)]
    h, *logits = (torch.from_numpy(np.concatenate(output)) for output in zip(*found, strict=True))
    return h, logits[0] if logits else None
