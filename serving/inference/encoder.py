"""Finds the encoder to serve, and runs it in ONNX Runtime on the fastest hardware of the machine."""

import contextlib
import ctypes
import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from export.artifact import Bundle, BundleError, load_bundle, probe_pixels, probe_values
from export.paths import local_path
from export.suggest import did_you_mean, program
from serving.limits import cores

log = logging.getLogger("twinview")

CPU = "CPUExecutionProvider"
STORED = "twinview-encoder"  # the encoder's name in BentoML's model store
MAX_BATCH = 32
# Largest difference over the largest value, by the card's precision. Rounding differs far less between processors.
PROBE_LIMITS = {"fp32": 1e-3, "fp16": 5e-3, "int8": 2e-2}
HOW_TO = (
    f"Make one with `{program('training/pretrain.py')}` and then `{program('export/to_onnx.py')}`, or take one that "
    f"others trained: `{program('export/to_onnx.py')} lite0`"
)
TENSORRT = "nvinfer_10.dll" if sys.platform == "win32" else "libnvinfer.so.10"
CUDA_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class NoEncoder(BundleError):
    """There is no encoder to serve. The message says how to make one."""


def find_bundle(name: str | None = None, runs: Path = Path("runs"), used: Collection[str] = ()) -> Bundle:
    """Load and check the encoder to serve. Arguments and errors as `locate`; raises BundleError too.

    used  ids of the encoders whose vectors a collection holds: without a name, one of these is preferred to a newer one
    """
    newest = load_bundle(locate(name, runs))
    if name or not used or newest.card.id in used:
        return newest
    for folder in exports(runs):
        with contextlib.suppress(BundleError, OSError):
            bundle = load_bundle(folder)
            if bundle.card.id in used:
                return bundle
    return newest


def locate(name: str | None = None, runs: Path = Path("runs")) -> Path:
    """Returns the folder of the encoder to serve: `name`, else the newest export in `runs`, else the model store's.

    name    a bundle's folder; the folder or the name of an exported run, such as lite0; or a tag of the model store
    raises  NoEncoder
    """
    if name:
        for folder in (local_path(name), runs / name):
            if (folder / "encoder").exists():
                return folder / "encoder"
            if (folder / "checkpoints").exists():
                raise NoEncoder(f"{folder} is not exported yet. Export it: `{program('export/to_onnx.py')} {folder}`.")
            if folder.exists():
                return folder
        stored = _in_store(name)
        if stored is None:
            how = f"Export it: `{program('export/to_onnx.py')} {name}`" if _of_others(name) else HOW_TO
            near = did_you_mean(name, [folder.parent.name for folder in exports(runs)])
            raise NoEncoder(
                f"{name} is neither an exported encoder's folder, nor a run in {runs}/, nor a tag of BentoML's model "
                f"store{near or '.'} {how}."
            )
        return stored
    found = exports(runs)
    folder = found[0] if found else _in_store(STORED)
    if folder is None:
        raise NoEncoder(
            f"There is no encoder: nothing under {local_path(runs)}/ and none in BentoML's model store. {HOW_TO}."
        )
    return folder


def exports(runs: Path = Path("runs")) -> list[Path]:
    """Returns the folders of the encoders exported under `runs`, the newest first."""
    cards = sorted(runs.glob("*/encoder/model_card.json"), key=lambda card: card.stat().st_mtime, reverse=True)
    return [card.parent for card in cards]


def _of_others(name: str) -> bool:
    """Whether it is a name of training/zoo.py. torchvision's without a prefix are not known here, without torch."""
    return name.partition(":")[0] in ("lite0", "timm", "torchvision") or name.endswith(".onnx")


def _in_store(tag: str) -> Path | None:
    import bentoml  # takes a second, and an encoder in a folder does not need it

    try:
        return Path(bentoml.models.get(tag).path)
    except (bentoml.exceptions.BentoMLException, ValueError):  # absent, or not a tag
        return None


class OnnxEncoder:
    """f in ONNX Runtime. On the CPU any number of threads may call it at once, on a GPU only one."""

    def __init__(self, bundle: Bundle, threads: int | None = None, graph: bytes | None = None):
        """Load, warm up, and check that the output agrees with the model card.

        threads  for one run on the CPU; by default one per core
        graph    content of the bundle's graph, if its file must not be read
        raises   BundleError when the graph does not run, or its output differs from that at the export
        """
        self.card = bundle.card
        self.gpu_problem: str | None = None
        """Why it runs on the CPU although there is a GPU."""
        *better, last = _accelerations()
        for providers in better:
            try:
                self._open(bundle, graph or bundle.graph, providers, threads)
                if self.providers[0] == CPU:
                    self.gpu_problem = f"ONNX Runtime could not use {_name(providers[0])}"
                return
            except BundleError as error:
                self.gpu_problem = str(error)
                log.warning("%s does not work here, so the next provider is tried: %s", _name(providers[0]), error)
        self._open(bundle, graph or bundle.graph, last, threads)

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's execution providers. The first runs the graph, the others the nodes that it cannot run."""
        return list(self._session.get_providers())

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, S, S, 3) -> h, float32 (n, d); n from 1 to MAX_BATCH."""
        return self.rows(pixels)[:, : self.card.dimension]

    def rows(self, pixels: np.ndarray) -> np.ndarray:
        """Like a call, but returns the logits of a classifier after h: float32 (n, d + C)."""
        if self._buckets is not None:
            return self._buckets(pixels)
        return _joined(self._session.run(None, {"pixels": pixels}))

    def _open(self, bundle: Bundle, graph: Path | bytes, providers: list, threads: int | None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        options.log_severity_level = 3
        # Threads that spin while they wait for work would take the cores that decode the next images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        size, width = bundle.card.preprocessing.size_px, bundle.card.outputs
        try:
            self._session = ort.InferenceSession(graph, options, providers=providers)
            preferred = _name(providers[0])
            if self.providers[0] != preferred:
                log.warning("ONNX Runtime could not use %s here; it runs on %s", preferred, self.providers[0])
            on_gpu = self.providers[0] != CPU
            self._buckets = Buckets(self._session, size, "cuda") if on_gpu else None
            sizes = Buckets.SIZES[:-1] if on_gpu else ()
            for n in (MAX_BATCH, *sizes):  # the largest first: it needs the most memory
                shape = self.rows(np.zeros((n, size, size, 3), np.uint8)).shape
                if shape != (n, width):
                    actual = " x ".join(map(str, shape[1:]))
                    raise BundleError(f"{bundle.graph} returns {actual} numbers per image; its card says {width}")
            difference = self._difference()
        except BundleError:
            raise
        except Exception as error:  # ONNX Runtime has many exception classes without a common base class
            raise BundleError(f"{bundle.graph} does not run: {error}") from error
        limit = PROBE_LIMITS[bundle.card.precision]
        if not difference <= limit:
            raise BundleError(
                f"{bundle.graph} on {self.providers[0]} differs by {difference:.1e} from its output at the export "
                f"(limit {limit})"
            )

    def _difference(self) -> float:
        """Largest difference from the card's probe values, over the largest of them; 0 if the card has none."""
        expected = np.asarray(self.card.probe)
        actual = probe_values(self(probe_pixels(self.card.preprocessing.size_px))[0])
        if not expected.size:
            return 0.0
        if len(actual) != len(expected):
            return float("inf")
        return float(np.abs(np.subtract(actual, expected)).max() / np.abs(expected).max())


class Buckets:
    """A session on a GPU that only runs a few batch sizes, with a buffer in GPU memory for each.

    cuDNN and TensorRT spend time on preparations for every new size. A batch is padded to the next size, and the extra
    rows are dropped.
    """

    SIZES = (1, 2, 4, 8, 16, MAX_BATCH)

    def __init__(self, session: ort.InferenceSession, size_px: int, device: str):
        self._session = session
        self._bound = {}
        for n in self.SIZES:
            pixels = ort.OrtValue.ortvalue_from_shape_and_type((n, size_px, size_px, 3), np.uint8, device, 0)
            binding = session.io_binding()
            binding.bind_ortvalue_input("pixels", pixels)
            for output in session.get_outputs():
                binding.bind_output(output.name, device)
            self._bound[n] = pixels, binding

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, S, S, 3) -> float32 (n, d), n <= MAX_BATCH. Several outputs are joined along the columns."""
        rows = len(pixels)
        n = next(size for size in self.SIZES if size >= rows)
        buffer, binding = self._bound[n]
        if n > rows:
            pixels = np.concatenate([pixels, np.zeros((n - rows, *pixels.shape[1:]), np.uint8)])
        buffer.update_inplace(np.ascontiguousarray(pixels))
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return _joined(binding.copy_outputs_to_cpu())[:rows]


def _joined(outputs: Sequence[Any]) -> np.ndarray:
    return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=1)


def _accelerations() -> list[list]:
    """Lists of execution providers in ONNX Runtime's form, the fastest first. The last one, the CPU, has to work."""
    available = ort.get_available_providers()
    if "CUDAExecutionProvider" not in available or not _cuda_device():
        return [[CPU]]
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # loads the CUDA and cuDNN that pip installed
    # CUDA chooses algorithms by heuristics instead of trying all, and multiplies float32 in float32: for speed, export
    # fp16. TensorRT may multiply float32 in TF32, which has 10 bits of mantissa.
    cuda = ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"})
    if "TensorrtExecutionProvider" not in available or not _library(TENSORRT):
        return [[cuda, CPU], [CPU]]
    cache = Path.home() / ".cache/twinview/tensorrt"  # building engines takes minutes; they only run on this GPU
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    tensorrt = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache), "trt_timing_cache_enable": "1"}
    return [[("TensorrtExecutionProvider", tensorrt), cuda, CPU], [cuda, CPU], [CPU]]


def _name(provider: str | tuple[str, dict]) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def has_accelerator() -> bool:
    """Returns whether this machine may have something faster than the CPU."""
    return _accelerations()[0][0] != CPU


def _cuda_device() -> bool:
    """Returns whether the CUDA driver finds a GPU. ONNX Runtime prints errors when asked on a machine without one."""
    driver, count = _library(CUDA_DRIVER), ctypes.c_int(0)
    if driver is None:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
