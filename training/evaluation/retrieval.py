"""Retrieval by the cosine of h: whether the nearest pictures belong to the query's class.

precision@k  share of the k nearest that are of the query's class
recall@k     1 if one of the k nearest is, otherwise 0 (as in metric learning; not the share of the class found)
mAP          mean over the queries of the average precision over the whole ranking
"""

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 2**24  # most similarities in memory
NEAREST = 10  # pictures that `neighbours_shared` compares


def nearest(queries: Tensor, bank: Tensor, k: int, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and rows of each query's k nearest in the bank, (Q, k) each, the nearest first.

    queries, bank  (Q, d), (M, d) float
    exclude_self   the queries are the bank's rows in the same order, and no row is its own neighbour
    raises         ValueError: k is not between 1 and the number of candidates
    """
    candidates = len(bank) - exclude_self
    if not 1 <= k <= candidates:
        raise ValueError(f"k must be between 1 and the number of candidates, {candidates}, not {k}")
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    parts, step = [], max(1, AT_ONCE // len(bank))
    for start in range(0, len(queries), step):
        similarity = queries[start : start + step] @ bank.T  # (q, M)
        if exclude_self:
            similarity.diagonal(offset=start).fill_(-torch.inf)
        parts.append(similarity.topk(k, dim=1))
    cosines, rows = zip(*parts, strict=True)
    return torch.cat(cosines), torch.cat(rows)


def neighbours_shared(h: Tensor, other: Tensor, k: int = NEAREST) -> float:
    """Share of each picture's k nearest by cosine that are the same: h (N, d), other (N, d') float, in [0, 1]."""
    k = min(k, len(h) - 1)
    a, b = (nearest(x, x, k, exclude_self=True)[1] for x in (h, other))  # (N, k)
    return (a[:, :, None] == b[:, None, :]).any(dim=2).float().mean().item()


def metrics(
    queries: Tensor, query_labels: Tensor, bank: Tensor, bank_labels: Tensor, ks: tuple[int, ...]
) -> dict[str, Tensor]:
    """`precision@K` and `recall@K` for each k, and `mAP`: (Q,) float32 each, one value per query.

    raises  ValueError: k is larger than the bank, or the bank has no picture of a query's class
    """
    if not all(1 <= k <= len(bank) for k in ks):
        raise ValueError(f"each k must be between 1 and the bank's {len(bank)} pictures, not {ks}")
    if missing := set(query_labels.tolist()) - set(bank_labels.tolist()):
        raise ValueError(f"the bank contains no picture of class {min(missing)}")
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    ranks = torch.arange(1, len(bank) + 1)
    parts: dict[str, list[Tensor]] = {}
    step = max(1, AT_ONCE // 4 // len(bank))  # sorting needs several matrices of this size
    for rows, labels in zip(queries.split(step), query_labels.split(step), strict=True):
        order = (rows @ bank.T).argsort(dim=1, descending=True, stable=True)
        hit = (bank_labels[order] == labels[:, None]).float()  # (q, M)
        hits = hit.cumsum(dim=1)
        precision = hits / ranks
        values = {f"precision@{k}": precision[:, k - 1] for k in ks}
        values |= {f"recall@{k}": (hits[:, k - 1] > 0).float() for k in ks}
        values["mAP"] = (precision * hit).sum(dim=1) / hits[:, -1]
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}
