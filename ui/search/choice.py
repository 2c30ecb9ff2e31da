"""What is chosen on the map: which of its pictures lie within an outline and stand out."""

from dataclasses import dataclass

import numpy as np

from serving.client import Map


@dataclass(frozen=True)
class Choice:
    """As the browser sends it."""

    collection: str
    polygon: list[list[float]] | None
    """Corners x, y; all of the map where there is none."""
    by: str
    """label or group: what `numbers` are of."""
    numbers: list[int]
    """That stand out; all where it is empty."""

    @classmethod
    def parse(cls, told: dict) -> "Choice":
        """raises ValueError. It comes from outside."""
        try:
            polygon = told.get("polygon")
            corners = None if polygon is None else np.asarray(polygon, float).reshape(-1, 2).tolist()
            if told["by"] not in ("label", "group"):
                raise ValueError(told["by"])
            return cls(str(told["collection"]), corners, told["by"], [int(number) for number in told["numbers"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("what was chosen on the map cannot be read; choose again") from error

    def of(self, map: Map) -> list[str]:
        """Ids."""
        kept = np.ones(len(map.ids), bool)
        if self.numbers:
            kept &= np.isin(getattr(map, self.by), self.numbers)
        if self.polygon is not None:
            kept[kept] = within(map.x[kept], map.y[kept], np.asarray(self.polygon))
        return [map.ids[i] for i in np.flatnonzero(kept)]


def within(x: np.ndarray, y: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """x, y (n,), polygon (m, 2) -> (n,) bool, by the even-odd rule."""
    inside = np.zeros(len(x), bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:  # an edge counts where a ray to the right crosses it
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside
