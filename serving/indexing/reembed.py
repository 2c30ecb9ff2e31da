"""Embeds a collection again with another encoder, without a service."""

import queue
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import numpy as np
from tqdm import tqdm

from export.artifact import UnreadableImage
from serving.collection.index import Index, IndexProblem, Item
from serving.collection.reembedding import Embedded, Progress, Reembedding
from serving.indexing.fill import DECODING, BatchEncoder, PictureReader, Tally
from serving.indexing.originals import read_again
from serving.inference import decode


def reembed(
    index: Index, encoder: BatchEncoder, folders: Sequence[str], tally: Tally, without_skipped: bool = False
) -> Progress:
    """Embed what other encoders' tables have and the table of `index` has not. Updates `tally`.

    folders          below which items' paths are read
    without_skipped  whether the collection is complete without the items that cannot be embedded
    raises           IndexProblem. What is embedded by then is stored, also after Ctrl-C.
    """
    work, pictures = Reembedding(index), PictureReader(encoder.preprocessing)

    def read(item: Item) -> bytes | str:
        try:
            return read_again(index.store, index.files.path("originals", item.id), item, folders)
        except UnreadableImage as problem:
            return str(problem)

    with work.lease() as held, ExitStack() as stack:
        if not held:
            raise IndexProblem(
                f"{index.name} is being embedded again already, with {index.encoder_id}; to see how far it is, "
                f"GET /collections/{index.name}/reembedding"
            )
        work.start(without_skipped)
        processes: queue.SimpleQueue[decode.DecodingProcess] = queue.SimpleQueue()
        for _ in range(encoder.threads):
            processes.put(stack.enter_context(closing(decode.DecodingProcess(DECODING))))

        def embed(items: Sequence[Item], files: Sequence[bytes]) -> list[Embedded | str]:
            with _taken(processes) as process:
                read = list(pictures(process, files))
            good = [picture for picture in read if not isinstance(picture, str)]
            vectors = iter(encoder.encode(np.stack([picture.pixels for picture in good])) if good else ())
            return [
                picture
                if isinstance(picture, str)
                else Embedded(next(vectors), picture.thumbnail, picture.width, picture.height, len(data))
                for picture, data in zip(read, files, strict=True)
            ]

        left = sum(len(ids) for _, ids in work.missing())
        tally.present = work.now.total - left
        bar = stack.enter_context(tqdm(total=left, desc="embedding again", unit="img", dynamic_ncols=True))

        def watch(progress: Progress) -> None:
            bar.total = progress.total - tally.present  # others may add items meanwhile
            bar.update(progress.done + progress.skipped - tally.present - bar.n)

        try:
            return work.run(read, embed, encoder.threads, files=encoder.batch, watch=watch)
        except KeyboardInterrupt:
            work.cancel()  # so that no service goes on with it
            raise
        finally:
            tally.indexed = work.now.done - tally.present
            tally.skipped += [(one.name, one.reason) for one in work.skipped.values()]


@contextmanager
def _taken(processes: queue.SimpleQueue) -> Iterator[decode.DecodingProcess]:
    process = processes.get()
    try:
        yield process
    finally:
        processes.put(process)
