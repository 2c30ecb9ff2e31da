"""Other servers that benchmarks/serving.py compares with Twinview, serving the same ONNX file.

    uv venv /tmp/peers && uv pip install --python /tmp/peers/bin/python -r benchmarks/serving_peers.txt

    bentoml     a batchable method on list[PIL.Image], as in BentoML's documentation
    litserve    base64 in JSON, batches of up to 32
    infinity    data URIs in its embeddings route, with its own batching

All use the same pixels as Twinview's encoder. The settings favour them: BentoML and LitServe have a worker per core,
LitServe its faster queue, and each session runs on one thread, which for infinity is twice as fast as two. infinity
supports pictures only with transformers' models in torch, and ONNX files only for texts, so its server and batching run
here with our model in place of the one that it would load.

TWINVIEW_ENCODER names the bundle. Only export/artifact.py is imported from the project.
"""

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import export.silence  # noqa: F401  turns off ONNX Runtime's reports before its import

import base64
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image

from export.artifact import load_bundle, preprocess, read_pixels

MAX_BATCH = 32
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Model:
    """A bundle in ONNX Runtime, without a server."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """threads: number of threads of a run"""
        bundle = load_bundle(folder)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        if Path("/dev/nvidiactl").exists() and "CUDAExecutionProvider" in ort.get_available_providers():
            ort.preload_dlls()
            providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}))
        self.preprocessing = bundle.card.preprocessing
        self.session = ort.InferenceSession(bundle.graph, options, providers=providers)

    def read(self, data: bytes) -> np.ndarray:
        """An encoded image -> uint8 (S, S, 3)."""
        return read_pixels(data, self.preprocessing)

    def fit(self, image: Image.Image) -> np.ndarray:
        """An image of any size -> uint8 (S, S, 3)."""
        return preprocess(image.convert("RGB"), self.preprocessing)

    def __call__(self, pixels: list[np.ndarray]) -> np.ndarray:
        """n times uint8 (S, S, 3) -> float32 (n, d)."""
        return self.session.run(["embedding"], {"pixels": np.stack(pixels)})[0]


def model() -> Model:
    return Model(Path(os.environ["TWINVIEW_ENCODER"]))


if "bentoml" in sys.modules:  # BentoML loads this file for the service
    import bentoml

    @bentoml.service(workers=CORES)
    class Plain:
        def __init__(self) -> None:
            self.model = model()

        @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)
        def embed(self, images: list[Image.Image]) -> np.ndarray:
            return self.model([self.model.fit(image) for image in images])


if importlib.util.find_spec("litserve"):
    import litserve

    class Images(litserve.LitAPI):
        def setup(self, device):
            self.model = model()

        def decode_request(self, request):
            return self.model.read(base64.b64decode(request["image"]))

        def batch(self, inputs):
            return inputs

        def predict(self, pixels):
            return self.model(pixels)

        def unbatch(self, output):
            return output

        def encode_response(self, output):
            return {"embedding": output.tolist()}


def serve_litserve(port: int) -> None:
    api = Images(max_batch_size=MAX_BATCH, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=CORES, fast_queue=True, timeout=False)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


def serve_infinity(port: int) -> None:
    import infinity_emb.engine
    import uvicorn
    from infinity_emb import EngineArgs, create_server
    from infinity_emb.transformer.abstract import BaseTIMM

    class Images(BaseTIMM):
        def __init__(self) -> None:
            self.model = model()

        def encode_pre(self, images):
            return [self.model.fit(image) for image in images]

        def encode_core(self, pixels):
            return self.model(pixels)

        def encode_post(self, vectors):
            return list(vectors)

        def tokenize_lengths(self, texts):
            return [1] * len(texts)

    infinity_emb.engine.select_model = lambda arguments: ([Images()], 4e-3, 4e-3)
    arguments = EngineArgs(model_name_or_path="encoder", batch_size=MAX_BATCH, engine="optimum", device="cpu")
    uvicorn.run(create_server(engine_args_list=[arguments]), host="127.0.0.1", port=port, log_level="warning")


@dataclass(frozen=True)
class Peer:
    module: str
    command: list[str]  # after its python; PORT stands for the port
    ready: str  # path that answers 200 when the service is ready
    request: str
    ask: Callable[[bytes], tuple[str, str, bytes]]
    """JPEG file -> path, content type, body."""


def as_multipart(jpeg: bytes) -> tuple[str, str, bytes]:
    head = 'Content-Disposition: form-data; name="images"; filename="a.jpg"\r\nContent-Type: image/jpeg'
    body = f"--cut\r\n{head}\r\n\r\n".encode() + jpeg + b"\r\n--cut--\r\n"
    return "/embed", "multipart/form-data; boundary=cut", body


def as_base64(jpeg: bytes) -> tuple[str, str, bytes]:
    return "/predict", "application/json", json.dumps({"image": base64.b64encode(jpeg).decode()}).encode()


def as_data_uri(jpeg: bytes) -> tuple[str, str, bytes]:
    uri = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    body = {"model": "encoder", "modality": "image", "input": [uri]}
    return "/embeddings", "application/json", json.dumps(body).encode()


THIS = "benchmarks/serving_peers.py"
PLAIN = ["-m", "bentoml", "serve", "benchmarks.serving_peers:Plain", "--port", "PORT"]
PEERS = {
    "bentoml": Peer("bentoml", PLAIN, "/readyz", "multipart, JSON", as_multipart),
    "litserve": Peer("litserve", [THIS, "litserve", "PORT"], "/health", "base64, JSON", as_base64),
    "infinity": Peer("infinity_emb", [THIS, "infinity", "PORT"], "/health", "data URI, JSON", as_data_uri),
}

if __name__ == "__main__":
    {"litserve": serve_litserve, "infinity": serve_infinity}[sys.argv[1]](int(sys.argv[2]))
