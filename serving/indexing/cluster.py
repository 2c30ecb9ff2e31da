"""The work of serving/bulk.py, distributed over a Ray cluster.

RAY_ADDRESS names the cluster; without it this machine is the cluster. Ray Data hands out blocks of the files to read.
There is one actor per core, or per GPU if the cluster has any: it loads the encoder once, then reads, embeds and
writes. All machines must reach the data and the index at the same path and have this package; the encoder is sent to
them.
"""

import os
import pickle
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from export.artifact import Bundle, ModelCard, save_bundle
from serving.collection.changes import new_id
from serving.collection.index import Index, IndexProblem
from serving.indexing.fill import Tally, batch_encoder, fill
from serving.indexing.originals import Originals
from training.data.sources import DataError

BLOCK_FILES = 512  # one commit per block


class FillActor:
    def __init__(
        self, graph: bytes, card: ModelCard, uri: str, name: str, known: Any, allow_other_encoder: bool, change: str
    ):
        """known  Ray's reference to the ids in the collection
        change  id of the change that all actors write together
        """
        import ray  # pyrefly: ignore[missing-import]  # not installed by default

        with tempfile.TemporaryDirectory() as folder:
            self._encoder = batch_encoder(save_bundle(Path(folder) / "encoder", graph, card), cpu_cores=1)
        self._index = Index(uri, card.id, card.dimension, name)
        self._known, self._allow_other_encoder = set(ray.get(known)), allow_other_encoder
        self._change = change

    def __call__(self, block: pa.Table) -> pa.Table:
        """Pickled originals -> one row with their number and the pickled Tally."""
        originals, tally = [pickle.loads(file) for file in block["original"].to_pylist()], Tally()
        with self._index.one_change(id=self._change) as index:
            fill(
                originals,
                len(originals),
                self._encoder,
                index,
                tally,
                self._known,
                allow_other_encoder=self._allow_other_encoder,
                quiet=True,
            )
        return pa.table({"done": [len(originals)], "tally": [pickle.dumps(tally)]})


def fill_by_ray(
    originals: Originals, bundle: Bundle, index: Index, tally: Tally, known: set[str], allow_other_encoder: bool
) -> None:
    """Like `fill`. Also raises DataError if Ray is not installed, or for a source that only one process can read."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports
    try:
        import ray  # pyrefly: ignore[missing-import]  # not installed by default
        import ray.data  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise DataError("--ray needs Ray, which is not installed: pip install 'twinview[ray]'") from error
    start_ray = not ray.is_initialized()
    if start_ray:
        ray.init(log_to_driver=False, logging_level="warning")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the bar below replaces them
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actors = gpus or int(ray.cluster_resources()["CPU"])
        uri = str(index.store.local.resolve()) if index.store.local else index.store.uri
        parts, change = (bundle.graph.read_bytes(), bundle.card), index.change_id or new_id()
        arguments = (*parts, uri, index.name, ray.put(known), allow_other_encoder, change)
        blocks = ray.data.from_arrow_refs([ray.put(block) for block in _blocks(originals)])
        done = blocks.map_batches(
            FillActor,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=0 if gpus else 1,
            num_gpus=1 if gpus else 0,
        )
        with tqdm(total=originals.count, desc="indexing", unit="img", dynamic_ncols=True) as bar:
            for row in done.iter_rows():
                tally += pickle.loads(row["tally"])
                bar.update(row["done"])
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise IndexProblem(f"a Ray actor failed ({reason}); finished blocks are stored") from error
    finally:
        if start_ray:
            ray.shutdown()


def _blocks(originals: Originals) -> Iterator[pa.Table]:
    files = iter(originals.files)
    while block := list(islice(files, BLOCK_FILES)):
        try:
            yield pa.table({"original": pa.array([pickle.dumps(original) for original in block], pa.large_binary())})
        except TypeError as error:  # a .zip holds a lock
            raise DataError("--ray cannot read a .zip, because only one process at a time can; unpack it") from error
