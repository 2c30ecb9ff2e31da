"""Request ids, security headers, metrics and the log."""

import asyncio
import io
import json
import logging
import re

import httpx
import pytest

from serving.access import Access
from serving.api import log

SAFETY = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "content-security-policy": "frame-ancestors 'self'",
    "x-frame-options": "SAMEORIGIN",
    "cross-origin-resource-policy": "same-origin",
}


@pytest.fixture
def json_log(monkeypatch):
    """json_log() -> the parsed lines of the JSON log."""
    service, written = logging.getLogger("twinview"), io.StringIO()
    before = service.handlers[:], service.propagate, service.level, log.requests.level
    monkeypatch.setattr("sys.stderr", written)
    log.install({"TWINVIEW_LOG": "json"})
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    service.handlers[:], service.propagate = before[:2]
    service.setLevel(before[2])
    log.requests.setLevel(before[3])


@pytest.mark.slow
def test_every_response_has_the_security_headers(serve, picture, monkeypatch):
    http = serve()
    answers = [
        http.get("/livez"),
        http.get("/", follow_redirects=False),
        http.get("/docs"),
        http.get("/docs/assets/favicon-light-32x32.png"),
        http.get("/openapi.json"),
        http.get("/nothing"),
        http.put("/embed"),
        http.post("/embed", content=picture(0)),
        http.post("/embed", headers={"content-length": str(2**40)}, content=b""),
        serve(access=Access.from_keys("k")).get("/collections"),
    ]

    async def fail(*_):
        raise RuntimeError

    monkeypatch.setattr(http.app.state.engine, "embed", fail)
    answers.append(http.post("/embed", content=picture(0)))
    assert [answer.status_code for answer in answers] == [200, 307, 200, 200, 200, 404, 405, 200, 413, 401, 500]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in SAFETY} == SAFETY
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


@pytest.mark.parametrize("given", ["abc", "2026-01-31T12:00:00+00:00/7", "a" * 128])
def test_a_valid_request_id_is_kept(http, given):
    assert http.get("/livez", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", 'a"b', "a\tb", "ä".encode(), "a" * 129, "<script>", "{}"])
def test_an_invalid_request_id_is_replaced(http, given):
    got = http.get("/livez", headers={"X-Request-Id": given}).headers.get_list("x-request-id")
    assert len(got) == 1 and re.fullmatch(r"[0-9a-f]{32}", got[0])


def test_a_header_and_the_metrics_have_the_time_in_each_stage(http, picture):
    for path, body in (("/embed", {"content": picture(0)}), ("/embed", {"files": {"images": ("a.png", picture(1))}})):
        answer = http.post(path, **body)
        stages = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"]))
        assert list(stages) == ["decode", "queue", "model"]
        assert all(0 <= float(duration) < 10_000 for duration in stages.values())
    text = http.get("/metrics").text
    for stage in ("decode", "queue", "model"):
        assert f'twinview_stage_seconds_count{{stage="{stage}"}} 2.0' in text
    assert "twinview_images_total 2.0" in text
    assert "twinview_images_waiting 0.0" in text


def test_clients_cannot_add_labels_to_the_metrics(http, picture):
    def series() -> set[str]:
        return {line.rpartition(" ")[0] for line in http.get("/metrics").text.splitlines() if line[0] != "#"}

    def ask(i: int) -> None:
        http.get(f"/invented/{i}")
        http.get(f"/collections/{i}/items/{i}/thumbnail")
        http.get(f"/v1/models/{i}")
        http.get(f"/docs/assets/{i}")
        http.get("/collections", headers={"X-Request-Id": str(i)})
        http.post(f"/embed?model={i}", content=picture(0))
        http.request(f"M{i}", "/embed")

    ask(0), series()
    before = series()
    for i in range(1, 10):
        ask(i)
    assert series() == before


def test_a_request_is_a_line_of_json(http, picture, bundle, json_log):
    http.post("/embed?normalize=true", content=picture(0), headers={"X-Request-Id": "mine"})
    http.get("/collections/secret-name/items/secret-name/thumbnail")
    embedded, missed = (line for line in json_log() if "status" in line)
    assert embedded == {
        "time": embedded["time"],
        "level": "info",
        "message": "POST /embed 200",
        "request_id": "mine",
        "method": "POST",
        "route": "/embed",
        "status": 200,
        "seconds": embedded["seconds"],
        "images": 1,
        "model": bundle.card.id,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", embedded["time"])
    assert 0 < embedded["seconds"] < 10
    assert (missed["route"], missed["status"]) == ("/collections/{name}/items/{id}/thumbnail", 404)
    assert "secret" not in json.dumps(missed)


def test_an_unexpected_exception_is_logged_under_the_requests_id(http, picture, json_log, monkeypatch):
    async def fail(*_):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(http.app.state.engine, "embed", fail)
    answer = http.post("/embed", content=picture(0))
    fault, request = json_log()
    assert fault["level"] == "error" and "the disk is gone" in fault["exception"]
    assert fault["request_id"] == request["request_id"] == answer.headers["x-request-id"]
    assert request["status"] == 500


def test_a_request_from_this_process_is_logged_too(http, json_log):
    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(http.app), base_url="http://127.0.0.1") as within:
            return (await within.get("/collections")).status_code

    assert asyncio.run(ask()) == 200
    (line,) = json_log()
    assert (line["route"], line["status"]) == ("/collections", 200)


def test_the_start_logs_whom_the_service_answers(serve, caplog):
    caplog.set_level(logging.INFO, "twinview")
    for access, message in (
        (Access(), "there are no API keys, so the service answers requests from this machine only"),
        (Access(open=True), "there are no API keys, so the service answers everyone"),
    ):
        caplog.clear()
        serve(access=access)
        assert message in caplog.text
    caplog.clear()
    serve(access=Access.from_keys("key"))
    assert "API keys" not in caplog.text


def test_the_json_log_names_the_key_of_a_request(json_log, serve):
    http = serve(access=Access.from_keys("anna s3cr3t", "0ther"))
    for key in ("s3cr3t", "0ther", "wrong"):
        http.get("/collections", auth=("me", key))
    assert [line.get("key") for line in json_log() if "status" in line] == ["anna", "key 2", None]


def test_the_text_log_has_no_line_per_request(http, picture, caplog):
    caplog.set_level(logging.INFO, "twinview")
    http.post("/embed", content=picture(0))
    assert "POST" not in caplog.text


def test_an_unknown_form_of_log_is_refused():
    with pytest.raises(ValueError, match="TWINVIEW_LOG is json or text, not 'xml'"):
        log.install({"TWINVIEW_LOG": "xml"})
