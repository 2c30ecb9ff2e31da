"""Texts as vectors that are compared with those of pictures, by an encoder's text tower."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort

from export.artifact import Bundle, BundleError, probe_values
from export.tokens import PROBE_TEXT, NoTokenizers, Tokens, open_tokenizer
from serving.errors import NotOffered, NotReady
from serving.inference.encoder import CPU, PROBE_LIMITS

log = logging.getLogger("twinview")


class TextEncoder:
    """The text tower of a bundle, on one core. It takes no memory until the first text comes."""

    def __init__(self, bundle: Bundle):
        self._bundle = bundle
        self._loaded: tuple[Tokens, ort.InferenceSession] | None = None
        self._thread = ThreadPoolExecutor(1, "text")  # so that texts never take all cores

    async def __call__(self, text: str) -> np.ndarray:
        """Returns the text's vector of unit length, float32 (d,). Raises NotOffered, NotReady."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.vector, text)
        except NoTokenizers as error:
            raise NotOffered(str(error)) from error
        except BundleError as error:
            log.warning("%s", error)
            id = self._bundle.card.id
            raise NotReady(f"the text tower of {id} does not work here; the service's log says why") from error

    def vector(self, text: str) -> np.ndarray:
        """As a call, in this thread; one thread at a time. Raises NoTokenizers, BundleError."""
        if self._loaded is None:
            self._loaded = self._load()
        embedding = self._run(*self._loaded, text)
        return embedding / np.linalg.norm(embedding)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self) -> tuple[Tokens, ort.InferenceSession]:
        files, tower = self._bundle.read_text_files(), self._bundle.card.text
        if files is None or tower is None:
            raise BundleError(f"{self._bundle.card.id} has no text tower")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        try:
            tokens = Tokens(open_tokenizer(files.tokenizer), tower)
            session = ort.InferenceSession(files.graph, options, providers=[CPU])
            actual = probe_values(self._run(tokens, session, PROBE_TEXT))
        except NoTokenizers:
            raise
        except Exception as error:  # ONNX Runtime has many exception classes without a common base class
            raise BundleError(f"the text tower in {self._bundle.folder} does not run: {error}") from error
        difference = np.abs(np.subtract(actual, tower.probe)).max() / np.abs(tower.probe).max()
        if not difference <= PROBE_LIMITS["fp32"]:
            raise BundleError(
                f"the text tower in {self._bundle.folder} differs by {difference:.1e} from its output at the export "
                f"(limit {PROBE_LIMITS['fp32']})"
            )
        return tokens, session

    @staticmethod
    def _run(tokens: Tokens, session: ort.InferenceSession, text: str) -> np.ndarray:
        return np.asarray(session.run(["embedding"], tokens(text))[0])[0]
