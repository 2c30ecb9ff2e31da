"""Text as the tokens that a text tower takes. Needs the package tokenizers, the extra `text`, when a text is read.

The export and the service read texts with the same function, so the service gives the vectors that were checked.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

MISSING = "reading texts needs the package tokenizers: pip install 'twinview[text]'"
PROBE_TEXT = "A photo of 2 red shoes, seen from above."  # its vector is compared with the one at the export


class NoTokenizers(ValueError):
    """The package tokenizers is not installed. The message says how to install it."""


@dataclass(frozen=True)
class TextTower:
    """The text tower of an encoder: how a text becomes the input of text.onnx, and which files belong to it."""

    length: int
    """Number of tokens. A longer text is cut, a shorter one is padded."""
    pad: int
    """Id of the token that fills up a shorter text."""
    lower_case: bool = False
    """Whether a text is lower-cased first, because the tokenizer does not do it."""
    sha256: str = ""
    """SHA-256 of text.onnx."""
    tokenizer_sha256: str = ""
    """SHA-256 of tokenizer.json."""
    probe: list[float] = field(default_factory=list)
    """probe_values of the output for PROBE_TEXT, to check the loaded tower."""

    def __post_init__(self):
        if not self.length >= 1:
            raise ValueError(f"length must be at least 1, not {self.length}")
        if not self.pad >= 0:
            raise ValueError(f"pad must be at least 0, not {self.pad}")


def open_tokenizer(content: bytes) -> Any:
    """A tokenizers.Tokenizer of the content of a tokenizer.json. raises NoTokenizers; ValueError: it is none"""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise NoTokenizers(MISSING) from error
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises Exception itself
        raise ValueError(" ".join(str(error).split())[:200]) from error


class Tokens:
    """Reads texts as a tower takes them."""

    def __init__(self, tokenizer: Any, tower: TextTower):
        """tokenizer  of `open_tokenizer`, which is changed to cut and pad as the tower says"""
        cut, padding = tokenizer.truncation or {}, tokenizer.padding or {}
        tokenizer.enable_truncation(tower.length, direction=cut.get("direction", "right"))
        tokenizer.enable_padding(
            direction=padding.get("direction", "right"),
            pad_id=tower.pad,
            pad_token=tokenizer.id_to_token(tower.pad) or "",
            length=tower.length,
        )
        self._tokenizer, self._lower_case = tokenizer, tower.lower_case

    def __call__(self, text: str) -> dict[str, np.ndarray]:
        """The inputs of text.onnx: `ids` and `mask`, int64 (1, L) each. The mask is 1 for tokens of the text, 0 for
        padding. Tokens that mark the start and the end of a text are kept when it is cut."""
        text = text.encode(errors="replace").decode()  # without halves of surrogate pairs, which are no text
        encoded = self._tokenizer.encode(text.lower() if self._lower_case else text)
        return {"ids": np.array([encoded.ids], np.int64), "mask": np.array([encoded.attention_mask], np.int64)}
