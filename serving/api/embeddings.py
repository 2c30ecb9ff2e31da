"""OpenAI's shape of embeddings (https://platform.openai.com/docs/api-reference/embeddings), for images.

    {"input": ["data:image/png;base64,...", ...], "model": "twinview", "encoding_format": "base64"}
    {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": "..."}], "model": "...", "usage": ...}

An input is a data URI or bare base64 of an image's file, never a URL: nothing is fetched for anybody. A vector in
base64 is little-endian float32. The tokens that OpenAI bills for are images here.
"""

import base64
import binascii
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serving.errors import Malformed, TooLarge
from serving.inference.decode import Upload
from serving.protocol.queries import ALIAS

Form = Literal["float", "base64"]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class EmbeddingsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input: Annotated[
        list[str],
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
        Field(min_length=1, description="Images: data URIs, or base64 of their files."),
    ]
    model: str = Field(ALIAS, description=f"An id of /v1/models, or {ALIAS} for the default.")
    encoding_format: Form = "float"
    dimensions: int | None = Field(None, description="Only what the model gives: nothing is cut off.")
    user: str | None = Field(None, description="Not looked at.")
    modality: Literal["image"] = "image"
    normalize: bool = Field(False, description="Vectors of unit length. OpenAI has no such field.")


def images_of(query: EmbeddingsQuery, most: int) -> list[Upload]:
    """raises TooLarge, and Malformed for an input that holds no file; whether that is an image, decoding shows."""
    if len(query.input) > most:
        raise TooLarge(f"{len(query.input)} images in one request; at most {most} are taken", "input")
    return [Upload(f"input[{i}]", "", _bytes(text, f"input[{i}]")) for i, text in enumerate(query.input)]


def _bytes(text: str, field: str) -> bytes:
    head, comma, data = text.partition(",")
    if head[:5].lower() == "data:" and comma:
        if not head.lower().endswith(";base64"):
            raise Malformed(f"{field} is a data URI without base64; write data:image/png;base64,...", field)
    elif "://" in text[:64]:
        raise Malformed(
            f"{field} is a URL, and nothing is fetched here; send the image, as a data URI or base64", field
        )
    else:
        data = text
    for candidate in (data, "".join(data.splitlines())):  # some tools break it into lines
        try:
            return binascii.a2b_base64(candidate, strict_mode=True)
        except ValueError:
            continue
    raise Malformed(f"{field} is neither a data URI nor base64", field)


def write(vectors: np.ndarray, form: Form) -> list:
    """A row each, of (n, d) float32: for JSON by orjson."""
    if form == "float":
        return list(vectors)
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]


def answer(model: str, vectors: np.ndarray, form: Form) -> dict:
    rows = write(vectors, form)
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
        "model": model,
        "usage": {"prompt_tokens": len(rows), "total_tokens": len(rows)},
    }
