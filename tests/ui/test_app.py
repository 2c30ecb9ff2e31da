import asyncio
import json
import re
import socket

import gradio as gr
import pytest
import tyro
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from serving.client import AsyncClient, ServiceError
from serving.keys import Access, Lock
from ui import app
from ui.app import Options, build, main, mount, standalone
from ui.picture import Chosen


@pytest.fixture
def page_of(in_loop):
    return lambda client: in_loop(build, client)


@pytest.fixture
def alone(in_loop):
    """alone(client) -> a TestClient of the standalone page."""
    return lambda client: TestClient(in_loop(standalone, client))


def callback(page: gr.Blocks, name: str):
    return next(listener.fn for listener in page.fns.values() if listener.name == name)


def config(client: TestClient) -> dict:
    return json.loads(re.search(r"window.gradio_config = (\{.*?\});</script>", client.get("/ui/").text)[1])


def test_the_page_opens_where_no_service_answers(page_of):
    with socket.socket() as nobody:  # bound, not listening
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        shown = asyncio.run(callback(page_of(AsyncClient(url)), "show")((), 24, 0))
    assert f"the service at {url} cannot be reached" in shown[4]


def test_nothing_is_fetched_that_a_visitor_names(fake, alone):
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.listen()
        elsewhere.settimeout(0.2)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/secret"
        for way in (f"file={url}", f"file={url.replace('http', 'https')}", f"proxy={url}"):
            assert alone(fake()).get(f"/ui/gradio_api/{way}").status_code == 404
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def test_the_services_own_sentence_is_shown_where_there_is_no_encoder(fake, page_of):
    failure = ServiceError("There is no encoder. Make one with `python training/pretrain.py`.", 503, "not_ready")
    shown = asyncio.run(callback(page_of(fake(failure=failure)), "show")((), 24, 0))
    assert "There is no encoder. Make one with <code>python training/pretrain.py</code>." in shown[4]


def test_a_refused_picture_is_said_in_words_and_changes_nothing(fake, uploads, event, page_of):
    (uploads / "notes.txt").write_text("no picture")
    refusal = ServiceError("image (<notes>.txt) is not an image of a format this reads", 422, "undecodable", "image")
    upload = callback(page_of(fake(failure=refusal)), "upload")
    with pytest.warns(UserWarning, match=r"image \(&lt;notes&gt;.txt\) is not an image"):
        answer = asyncio.run(upload((), 24, 0, event(path=str(uploads / "notes.txt"))))
    assert answer == gr.skip()


def test_a_click_goes_on_from_there_and_back_returns(fake, event, page_of):
    page = page_of(fake())
    first = Chosen("mine.jpg", id="id9")
    trail, *_ = asyncio.run(callback(page, "click")((first,), 5, 0, event(id="id2", name="cat 2.jpg", label="cat")))
    assert trail == (first, Chosen("cat 2.jpg", "cat", id="id2"))
    trail, _, well, *_ = asyncio.run(callback(page, "step_back")(trail, 5, 0))
    assert trail == (first,) and "mine.jpg" in well


def test_pages_of_the_collection_begin_at_its_first(fake, page_of):
    page = page_of(fake())
    _, offset, *_, previous, more = asyncio.run(callback(page, "turn_on")(24, 0))
    assert (offset, previous["visible"], more["visible"]) == (60, True, False)
    _, offset, *_, previous, more = asyncio.run(callback(page, "turn_back")(24, 30))
    assert (offset, previous["visible"], more["visible"]) == (0, False, True)


def test_views_are_drawn_only_in_sight(fake, page_of):
    client = fake()
    draw = callback(page_of(client), "draw")
    settings = (1.0, 0.08, 0.5, 0.2, 0.5, 3, 0)
    asyncio.run(draw((Chosen("cat.jpg", id="id1"),), False, *settings))
    assert client.asked == []
    assert "Choose a picture first" in asyncio.run(draw((), True, *settings))[2]
    assert asyncio.run(draw((Chosen("cat.jpg", id="id1"),), True, *settings))[2].count('class="pair"') == 3


def test_mounted_the_page_asks_the_service_inside_the_process(in_loop):
    service = FastAPI()

    @service.get("/collections/pictures/items")
    async def items():
        raise RuntimeError("a bug")

    @service.exception_handler(Exception)
    async def _(request, error):
        return JSONResponse(
            {"error": {"message": "the service failed", "code": "internal", "type": "", "param": None}}, 500
        )

    assert in_loop(mount, service) is service
    page = next(route.app for route in service.routes if getattr(route, "path", None) == "/ui").get_blocks()
    assert "the service failed" in asyncio.run(callback(page, "show")((), 24, 0))[4]


def test_mounted_in_a_locked_service_the_page_needs_a_key_and_its_own_requests_none(in_loop):
    service = FastAPI()
    service.add_middleware(Lock, access=Access.of_keys("secret"))

    @service.get("/collections/pictures/items")
    async def items():
        return {"count": 1, "items": [{"id": "id1", "name": "pets/cat 1.jpg", "label": "cat", "path": None}]}

    page = next(route.app for route in in_loop(mount, service).routes if getattr(route, "path", None) == "/ui")
    assert "cat 1.jpg" in asyncio.run(callback(page.get_blocks(), "show")((), 24, 0))[4]
    http = TestClient(service)
    for path in ("/ui/", "/ui/config", "/ui/gradio_api/info"):
        assert http.get(path).status_code == 401
        assert http.get(path, auth=("", "secret")).status_code == 200


def test_nothing_is_reported_and_nothing_shared(fake, alone):
    with alone(fake()) as client:
        told = config(client)
        assert told["analytics_enabled"] is False
        assert told["footer_links"] == [] and told["run_history"] is False and told["mcp_server"] is False
        assert told["stylesheets"] == []
        assert "http" not in client.get("/ui/theme.css").text.replace("http://www.w3.org/", "")
        assert client.get("/ui/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_alone_the_page_passes_thumbnails_on(fake, alone):
    with alone(fake()) as client:
        answer = client.get("/collections/pictures/items/id1/thumbnail")
        assert (answer.content, answer.headers["content-type"]) == (b"a thumbnail", "image/jpeg")
        assert client.get("/").url.path == "/ui/"
    with alone(fake(failure=ServiceError("the service cannot be reached"))) as client:
        answer = client.get("/collections/pictures/items/id1/thumbnail")
        assert (answer.status_code, answer.text) == (502, "the service cannot be reached")


def test_a_port_in_use_is_said_in_one_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=f"^Port {port} cannot be used .*; name another with --port.$"):
            main(Options(port=port))
    with pytest.raises(SystemExit, match=r"^Port 99999 cannot be used"):
        main(Options(port=99999))


def test_alone_the_page_is_locked_as_a_service_is(in_loop, monkeypatch):
    """And asks the service with a key of its own."""
    made, clients = [], []
    monkeypatch.setattr("uvicorn.Config", lambda app, **_: made.append(app))
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("uvicorn.Server.__init__", lambda *_: None)
    monkeypatch.setattr(app, "standalone", lambda client: clients.append(client) or in_loop(standalone, client))
    monkeypatch.setenv("TWINVIEW_API_KEY", "the service's")
    main(Options(port=0))
    monkeypatch.setenv("TWINVIEW_API_KEYS", "the page's")
    main(Options(port=0))
    assert clients[0]._http.headers["Authorization"] == "Bearer the service's"
    assert TestClient(made[0]).get("/ui/").status_code == 200
    assert TestClient(made[0], base_url="http://evil.example").get("/ui/").status_code == 403
    assert TestClient(made[1]).get("/ui/").status_code == 401
    assert TestClient(made[1]).get("/ui/", auth=("", "the page's")).status_code == 200
    monkeypatch.setenv("TWINVIEW_API_KEYS_FILE", "/nowhere/keys")
    with pytest.raises(SystemExit, match=r"^error: TWINVIEW_API_KEYS_FILE: /nowhere/keys cannot be read$"):
        main(Options(port=0))


def test_the_script_explains_itself(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Options, description=app.__doc__, args=["--help"])
    told = capsys.readouterr().out
    assert "--service" in told and "--port" in told and "bentoml serve" in told
