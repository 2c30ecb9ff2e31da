"""The time of a run that was given --minutes: its command ends when they are over, by the clock.

Reading and decoding the pictures, compiling, measuring and saving are counted in; training takes what they leave. The
time kept free for what follows the last step is what the same work took before, scaled by the pace of the steps then
and now. Steps on all cores suffer more from other programs than measuring and saving, so the scale is a power of the
ratio of the two paces, and its exponent is corrected when work is done again. The learning rate follows `share`, so it
reaches 0 at the end also on a machine that slows down.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import psutil
import torch

from training.device import training_device

clock = time.monotonic
EXIT_S = 2.5  # what a process needs to end
STRETCH_S = 1.0  # the pace of steps is measured over so many seconds, or over one longer step
RECENT = 5  # how many such stretches make the pace, as their median
EXPONENT = 0.7  # when steps take twice as long, the work after the last one 2 ** 0.7 times as long, as measured
DOUBT = 1.0  # weight of that figure: small, so that it is soon corrected by what is measured in the run
LEAST = 100  # items that are always affordable
CHECK_S, MOST_STEPS = 1.0, 50  # how often several processes agree on the time: at each step would hold up a GPU
LATE = 1.1  # a run that took this many times its minutes says so


class Budget:
    """What is left of a run's time.

    share    of the training that is over, in [0, 1]
    is_over  no further step fits into the time
    """

    def __init__(self, minutes: float | None, began: float | None = None, saved: dict[str, Any] | None = None) -> None:
        """
        minutes  None: as long as it takes
        began    the moment when the command began, on `clock`; by default now
        saved    `state` of the interrupted run, whose time counts too
        """
        saved = saved or {}
        self.minutes = minutes
        self.began = (clock() if began is None else began) - saved.get("used_s", 0.0)
        self.share, self.is_over = saved.get("share", 0.0), False
        self.ending_s: dict[str, float] = saved.get("ending_s", {"exit": EXIT_S})
        """What is to be done after the last step, and the seconds that it took when it was done last."""
        self._pace_s: dict[str, float] = {}
        """Seconds per step then; of work before the first steps, theirs."""
        self._paces_s: deque[float] = deque(maxlen=RECENT)
        self._stretch = 0, 0.0  # steps and seconds since the last one of them
        self._first_s = math.nan  # the pace at the beginning
        self._learned = EXPONENT * DOUBT, DOUBT  # the exponent as a ratio: least squares of logarithms
        self._every = self._until = 1  # steps from one check to the next, and to the next one

    def state(self) -> dict[str, Any]:
        return {"used_s": self.used_s, "share": self.share, "ending_s": self.ending_s}

    @property
    def used_s(self) -> float:
        return clock() - self.began

    @property
    def left_s(self) -> float:
        """Seconds that are left for training."""
        if self.minutes is None:
            return math.inf
        ending = sum(took * self._slower(work) ** self.exponent for work, took in self.ending_s.items())
        return 60 * self.minutes - self.used_s - ending

    def _slower(self, work: str) -> float:
        """How many times as long a step takes as when the work was done last, or as at the beginning."""
        if math.isnan(self._first_s):
            return 1.0
        return median(self._paces_s) / self._pace_s.get(work, self._first_s)

    @property
    def exponent(self) -> float:
        """As EXPONENT, after what the run has shown: 0 to 1."""
        products, squares = self._learned
        return min(1.0, max(0.0, products / squares))

    @contextmanager
    def ending(self, work: str, times: float = 1.0) -> Iterator[None]:
        """Work that will be done again after the last step, and then takes so many times as long."""
        began = clock()
        yield
        took = max(times * (clock() - began), 1e-6)
        if work in self.ending_s:
            steps, ending = math.log(self._slower(work)), math.log(took / self.ending_s[work])
            products, squares = self._learned
            self._learned = products + took * steps * ending, squares + took * steps**2
        self.ending_s[work] = took
        if not math.isnan(self._first_s):
            self._pace_s[work] = median(self._paces_s)

    def start(self) -> None:
        """Training begins."""
        self._checked = self.started = clock()

    def step(self) -> None:
        """After each step, in every process: they all go by the clock of the first one."""
        self._until -= 1
        if self.minutes is None or self._until:
            return
        now = clock()
        spent, self._checked = now - self._checked, now
        steps, seconds = self._stretch
        self._stretch = steps + self._every, seconds + spent
        pace_s = self._stretch[1] / self._stretch[0]
        if self._stretch[1] >= STRETCH_S:
            self._paces_s.append(pace_s)
            self._stretch = 0, 0.0
        if self._paces_s:
            pace_s = median(self._paces_s)
        if len(self._paces_s) == RECENT and math.isnan(self._first_s):
            self._first_s = pace_s
        left = max(0.0, self.left_s)
        share = self.share + (1 - self.share) * (spent / (spent + left) if left else 1.0)
        every = min(max(1, int(CHECK_S / max(pace_s, 1e-6))), MOST_STEPS) if _is_shared() else 1
        self.share, is_over, every = of_the_first(share, left < every * pace_s, every)
        self.is_over, self._every, self._until = bool(is_over), int(every), int(every)

    def affordable(self, part: float, item_s: float, most: int) -> int:
        """How many items of `item_s` seconds each fit into a part of the minutes."""
        if self.minutes is None:
            return most
        (count,) = of_the_first(min(most, max(LEAST, part * 60 * self.minutes / item_s)))
        return int(count)

    def estimated_epochs(self, done: int) -> int:
        """How many epochs the run will have, after so many; as many when the time is over."""
        return done if self.is_over else max(done + 1, round(done / max(self.share, 1e-3)))

    def outcome(self) -> str:
        """How long the command took."""
        minutes = self.used_s / 60
        sentence = f"done in {minutes:.1f} min"
        if self.minutes is None or minutes <= LATE * self.minutes:
            return sentence
        before = (self.started - self.began) / 60
        return f"{sentence}, longer than --minutes {self.minutes:g}: training could begin after {before:.1f} min"


def of_the_first(*values: float) -> list[float]:
    """The values of the run's first process, in all of them."""
    if not _is_shared():
        return list(values)
    sent = torch.tensor(values, dtype=torch.float64, device=training_device())
    torch.distributed.broadcast(sent, 0)
    return sent.tolist()


def item_s(work: Callable[[], object], items: int) -> float:
    """Seconds for each of the items that the work does at once."""
    work()  # the first time takes longer
    began = clock()
    work()
    return max(1e-9, clock() - began) / items


def _is_shared() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_began() -> float:
    """The moment on `clock` when this process began, before Python and torch were loaded."""
    return clock() - max(0.0, time.time() - psutil.Process().create_time())
