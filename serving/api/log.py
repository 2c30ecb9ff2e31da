"""The service's log, written to standard error.

    TWINVIEW_LOG=json   one JSON object per line: the service's messages, and a line for every request

    {"time": "2026-01-31T12:00:00.123+00:00", "level": "info", "message": "POST /embed 200", "request_id": "8c1f...",
     "route": "/embed", "status": 200, "seconds": 0.0041, "images": 1, "model": "resnet18-0a1b2c3d4e5f", "key": "anna"}

"key" is the name of the request's API key. Otherwise the log is text and has no line per request; /metrics counts them.
Neither form contains a key itself, a query, pictures or file names.
"""

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)

requests = logging.getLogger("twinview.requests")
requests.setLevel(logging.WARNING)


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            line["request_id"] = request_id
        line.update(getattr(record, "facts", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def install(environment: Mapping[str, str]) -> None:
    """Set up logging as TWINVIEW_LOG says. Raises ValueError for a value other than text and json."""
    form = environment.get("TWINVIEW_LOG", "")
    if form not in ("", "text", "json"):
        raise ValueError(f"TWINVIEW_LOG is json or text, not {form!r}")
    if form != "json":
        return
    log = logging.getLogger("twinview")
    log.handlers[:] = [logging.StreamHandler(sys.stderr)]
    log.handlers[0].setFormatter(JsonLines())
    log.propagate = False
    log.setLevel(logging.INFO)
    requests.setLevel(logging.INFO)
