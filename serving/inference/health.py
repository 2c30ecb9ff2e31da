"""Whether an encoder still answers: it runs now and then on a fixed picture."""

import asyncio
from time import monotonic

from export.artifact import probe_pixels
from serving.errors import NotReady
from serving.inference.batcher import Batcher

EVERY_S = 5.0  # a good answer counts for so long
LIMIT_S = 10.0  # for an answer, which also waits for the batches that are running
PATIENCE_S = 1.0  # of one check; the next one looks again


class Health:
    """Use it in the event loop of the batcher."""

    def __init__(self, batch: Batcher, size_px: int):
        self._batch, self._pixels = batch, probe_pixels(size_px)
        self._probe: asyncio.Task | None = None
        self._begun = 0.0

    async def check(self) -> None:
        """Raises NotReady when the encoder has failed, or has not answered within LIMIT_S."""
        if self._probe is None or (self._probe.done() and monotonic() - self._begun > EVERY_S):
            self._probe, self._begun = asyncio.create_task(self._run()), monotonic()
        await asyncio.wait([self._probe], timeout=PATIENCE_S)
        if not self._probe.done():
            if monotonic() - self._begun > LIMIT_S:
                raise NotReady(f"the encoder has not answered for {LIMIT_S:g} s")
        elif problem := self._probe.result():
            raise NotReady(problem)

    async def _run(self) -> str | None:
        """Returns the reason why there is no answer."""
        try:
            await self._batch(self._pixels)
        except Exception as error:
            return str(getattr(error, "detail", error))
        return None
