"""serving/bulk.py's work, shared among the machines of a Ray cluster.

RAY_ADDRESS names the cluster; without it this machine is one. Ray Data hands out portions of what there is to read, and
an actor for each core, or each GPU where the cluster has some, loads the encoder once, reads, embeds and writes. Every
machine reaches data and index at the same place, and has this package; the encoder is sent to it.
"""

import os
import pickle
import tempfile
from itertools import islice
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from export.artifact import Bundle, ModelCard, save_bundle
from serving.collection.index import Index, IndexProblem
from serving.indexing.fill import Tally, fill, work_of
from serving.indexing.originals import Originals
from training.data.sources import DataError

PORTION = 512  # pictures; a commit each


class Filler:
    """One of the actors."""

    def __init__(self, graph: bytes, card: ModelCard, uri: str, name: str, known, beside: bool):
        import ray

        with tempfile.TemporaryDirectory() as folder:
            self._work = work_of(save_bundle(Path(folder) / "encoder", graph, card), threads=1)
        self._index = Index(uri, card.id, card.dimension, name)
        self._known, self._beside = set(ray.get(known)), beside

    def __call__(self, portion: pa.Table) -> pa.Table:
        """Pickled originals -> a row with the pickled Tally."""
        originals, tally = [pickle.loads(each) for each in portion["original"].to_pylist()], Tally()
        fill(originals, len(originals), self._work, self._index, tally, self._known, beside=self._beside, quiet=True)
        return pa.table({"done": [len(originals)], "tally": [pickle.dumps(tally)]})


def fill_by_ray(
    originals: Originals, bundle: Bundle, index: Index, tally: Tally, known: set[str], beside: bool
) -> None:
    """As `fill`. raises DataError also where there is no Ray, or for a source that one process alone can read."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DataError("--ray needs Ray, which is not installed here: pip install 'twinview[ray]'") from error
    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=False, logging_level="warning")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # there is one of our own
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actors = gpus or int(ray.cluster_resources()["CPU"])
        uri = str(index.store.local.resolve()) if index.store.local else index.store.uri
        arguments = (bundle.graph.read_bytes(), bundle.card, uri, index.name, ray.put(known), beside)
        portions = ray.data.from_arrow_refs([ray.put(portion) for portion in _portions(originals)])
        done = portions.map_batches(
            Filler,
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
        raise IndexProblem(f"an actor of Ray has failed ({reason}); what was done is kept") from error
    finally:
        if begun:
            ray.shutdown()


def _portions(originals: Originals):
    each = iter(originals.each)
    while some := list(islice(each, PORTION)):
        try:
            yield pa.table({"original": pa.array([pickle.dumps(original) for original in some], pa.large_binary())})
        except TypeError as error:  # the lock of a .zip
            raise DataError("--ray reads no .zip, which one process at a time can read; unpack it") from error
