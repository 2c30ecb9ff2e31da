"""Writes the routes' JSON answers."""

from collections.abc import Mapping
from typing import Any

import orjson
from fastapi.responses import Response

from serving.api.request import JSON


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """content  what orjson writes: dicts, lists, dataclasses, numpy arrays"""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status, headers, JSON)
