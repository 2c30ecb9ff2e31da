"""A similarity in words: closer than which share of random pairs of the collection's pictures.

A cosine of 0.96 is little if any two pictures have 0.9. The service's `closer_than` means the same in every collection
and with every encoder.
"""

from math import floor

STOPS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)  # offered as limits


def percent(closer_than: float) -> str:
    """Rounded down, and at most 99.99 %: the service compares with 100,000 pairs, not with all."""
    digits = 0 if closer_than < 0.99 else 1 if closer_than < 0.999 else 2
    steps = 10 ** (digits + 2)
    return f"{min(floor(closer_than * steps + 1e-6) / steps, 0.9999) * 100:.{digits}f}".removesuffix(".0") + " %"


def in_words(closer_than: float) -> str:
    return f"closer than {percent(closer_than)} of pairs"


def rank_html(closer_than: float | None) -> str:
    """Nothing if the rank is not known."""
    if closer_than is None:
        return ""
    meaning = f"{percent(closer_than)} of random pairs of pictures of this collection are less alike"
    return f'<span class="rank" title="{meaning}">{in_words(closer_than)}</span>'


def choices(least: float = 0.0, chosen: float = 0.0) -> list[tuple[str, float]]:
    """The limits to choose from, from the rank `least` up, and the chosen one, as the choices of a dropdown."""
    stops = {stop for stop in STOPS if stop >= least} | ({chosen} if chosen else set())
    return [(f"{percent(stop)} of pairs", stop) for stop in sorted(stops)]
