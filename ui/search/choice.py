"""A choice on the map: the pictures within an outline that have the highlighted labels or groups."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.client import Map


@dataclass(frozen=True)
class Choice:
    """The choice as the browser sends it."""

    collection: str
    polygon: list[list[float]] | None
    """Corners x, y of the outline; None for the whole map."""
    by: str
    """The column that `numbers` refer to: label or group."""
    numbers: list[int]
    """The highlighted labels or groups; empty for all."""

    @classmethod
    def parse(cls, data: dict[str, Any]) -> "Choice":
        """Raises ValueError if a browser would not send such data."""
        try:
            polygon = data.get("polygon")
            corners = None if polygon is None else np.asarray(polygon, float).reshape(-1, 2).tolist()
            if data["by"] not in ("label", "group"):
                raise ValueError(data["by"])
            return cls(str(data["collection"]), corners, data["by"], [int(number) for number in data["numbers"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("the selection on the map cannot be read; select again") from error

    def ids(self, map: Map) -> list[str]:
        """Ids of the chosen pictures of this map."""
        chosen = np.ones(len(map.ids), bool)
        if self.numbers:
            chosen &= np.isin(getattr(map, self.by), self.numbers)
        if self.polygon is not None:
            chosen[chosen] = within(map.x[chosen], map.y[chosen], np.asarray(self.polygon))
        return [map.ids[i] for i in np.flatnonzero(chosen)]


def within(x: np.ndarray, y: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """x, y (n,), polygon (m, 2) -> (n,) bool: which points lie inside, by the even-odd rule."""
    inside = np.zeros(len(x), bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:  # count the edges that a ray to the right crosses
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside
