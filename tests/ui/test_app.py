import asyncio
import json
import re
import socket
from pathlib import Path

import gradio as gr
import pytest
import tyro
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from starlette.datastructures import QueryParams

from serving.access import Access, RequireAccess
from serving.client import AsyncClient, Collection, ServiceError
from ui import app
from ui.app import PageOptions, build, main, mount, standalone
from ui.search.picture import Picture
from ui.search.query import Query

pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # Gradio's

USUAL = (24, 0, 0, [], "pictures", None, "")  # what the controls are set to


class Address:
    """Of the page, as its request tells it."""

    def __init__(self, query: str):
        self.query_params = QueryParams(query)


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


@pytest.mark.slow
def test_the_page_opens_where_no_service_answers(page_of):
    with socket.socket() as nobody:  # bound, not listening
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        shown = asyncio.run(callback(page_of(AsyncClient(url)), "show")((), 0, *USUAL))
    assert f"the service at {url} cannot be reached" in shown[3]


@pytest.mark.slow
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


@pytest.mark.slow
def test_no_program_has_a_picture_fetched_from_elsewhere(fake, alone):
    picture = {"path": "https://example.com/cat.png", "meta": {"_type": "gradio.FileData"}}
    with alone(fake()) as client:
        call = "/ui/gradio_api/call/similar"
        event = client.post(call, json={"data": [picture, [], [], 3, 0, [], "pictures", None]}).json()["event_id"]
        assert "this page loads nothing from other addresses" in client.get(f"{call}/{event}").text


@pytest.mark.slow
def test_programs_get_results_and_readable_errors(fake, alone, uploads):
    with alone(fake()) as client:

        def ask(name: str, *data) -> str:
            call = f"/ui/gradio_api/call/{name}"
            return client.get(f"{call}/{client.post(call, json={'data': data}).json()['event_id']}").text

        found = json.loads(ask("similar", None, ["id1"], [], 2, 0, [], "pictures", None).split("data: ")[1])[0]
        assert [(item["id"], item["similarity"]) for item in found] == [("id0", 1.0), ("id2", 0.875)]
        listed = json.loads(ask("collection", ["label=cat"], 3, 2, "pictures", None).split("data: ")[1])[0]
        assert (listed["count"], [item["id"] for item in listed["items"]]) == (100, ["id2", "id3", "id4"])
        assert "cat is not a condition like label=shirt" in ask("collection", ["cat"], 3, 0, "pictures", None)
        elsewhere = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        assert "event: error" in ask("similar", elsewhere, [], [], 2, 0, [], "pictures", None)


@pytest.mark.slow
def test_the_services_own_message_is_shown_if_there_is_no_encoder(fake, page_of):
    failure = ServiceError("There is no encoder. Make one with `python training/pretrain.py`.", 503, "not_ready")
    shown = asyncio.run(callback(page_of(fake(failure=failure)), "show")((), 0, *USUAL))
    assert "There is no encoder. Make one with <code>python training/pretrain.py</code>." in shown[3]


@pytest.mark.slow
def test_a_refused_picture_is_reported_and_taken_off_the_trail(fake, uploads, event, page_of):
    (uploads / "notes.txt").write_text("no picture")
    refusal = ServiceError("image (<notes>.txt) is not an image of a format this reads", 422, "undecodable", "image")
    page, before = page_of(fake(failure=refusal)), (Query((Picture("mine.jpg", id="id9"),)),)
    trail = callback(page, "upload")(before, event(paths=[str(uploads / "notes.txt")]))
    with pytest.warns(UserWarning, match=r"image \(&lt;notes&gt;.txt\) is not an image"):
        trail, *others = asyncio.run(callback(page, "show")(trail, 0, *USUAL))
    assert trail == before and all(other == gr.skip() for other in others)


@pytest.mark.slow
def test_a_failure_of_the_service_is_shown_instead_of_results_and_keeps_the_trail(fake, page_of):
    page, trail = page_of(fake(failure=ServiceError("the service is busy", 429))), (Query((Picture("a", id="id9"),)),)
    answer = asyncio.run(callback(page, "show")(trail, 0, *USUAL))
    assert answer[0] == gr.skip() and "the service is busy" in answer[3]


@pytest.mark.slow
def test_an_invalid_condition_is_reported_instead_of_results(fake, page_of):
    shown = asyncio.run(callback(page_of(fake()), "show")((), 0, 24, 0, 0, ["shirt"], "pictures", None, ""))
    assert "shirt is not a condition like label=shirt" in shown[3]


@pytest.mark.slow
def test_the_limit_is_a_rank_where_ranks_are_known_and_a_cosine_elsewhere(fake, page_of):
    client, trail = fake(), (Query((Picture("a", id="id0"),)),)
    show = callback(page_of(client), "show")

    def shown(trail, least=0.0, closer=0.0) -> tuple[bool, bool]:
        answer = asyncio.run(show(trail, 0, 24, least, closer, [], "pictures", None, ""))
        return answer[6]["visible"], answer[7]["visible"]

    assert (shown(()), shown(trail)) == ((False, False), (True, False))
    client.rank = 0.998
    assert (shown(()), shown(trail)) == ((False, False), (False, True))
    assert shown(trail, closer=0.9999) == (False, True), "without results the limit can be lowered"
    assert shown(trail, least=0.5) == (True, False), "of a link"
    assert shown((trail[0].unlike(Picture("b", id="id1")),), closer=0.9) == (True, False)


@pytest.mark.slow
def test_a_click_starts_a_new_search_and_plus_and_minus_change_the_current_one(fake, event, page_of):
    page, first = page_of(fake()), Query((Picture("mine.jpg", id="id9"),))
    clicked, cat = event(id="id2", name="cat 2.jpg", label="cat"), Picture("cat 2.jpg", "cat", id="id2")
    assert callback(page, "click")((first,), clicked) == (first, Query((cat,)))
    assert callback(page, "like")((first,), clicked) == (first, first.like(cat))
    assert callback(page, "unlike")((first,), clicked) == (first, first.unlike(cat))
    assert callback(page, "like")((), clicked) == (Query((cat,)),)
    with pytest.warns(UserWarning, match=r"^Search by a picture first"):
        assert callback(page, "unlike")((), clicked) == gr.skip()


@pytest.mark.slow
def test_paging_stops_at_the_first_picture_and_a_condition_returns_to_it(fake, page_of):
    page = page_of(fake())
    _, offset, *_, previous, more = asyncio.run(callback(page, "next_page")(0, *USUAL))
    assert (offset, previous["visible"], more["visible"]) == (60, True, False)
    _, offset, *_, previous, more = asyncio.run(callback(page, "previous_page")(30, *USUAL))
    assert (offset, previous["visible"], more["visible"]) == (0, False, True)
    _, offset, *_ = asyncio.run(callback(page, "show_first_page")((), *USUAL))
    assert offset == 0


@pytest.mark.slow
def test_the_page_opens_with_the_search_of_its_address(fake, page_of):
    start = callback(page_of(fake()), "start")
    address = Address("like=id3&k=7&closer=0.985&where=label=cat")
    trail, k, least, closer, where, collection, encoder, beside = asyncio.run(start(address))
    assert trail == (Query((Picture("pets/cat 3.jpg", "cat", id="id3"),)),)
    assert (k, least, closer["value"], where["value"]) == (7, 0, 0.985, ["label=cat"])
    assert closer["choices"][0] == ("no limit", 0) and ("98 % of pairs", 0.985) in closer["choices"]
    assert not any(one["visible"] for one in (collection, encoder, beside)), "there is one of each"
    with pytest.warns(UserWarning, match="no item gone is in the collection"):
        assert asyncio.run(start(Address("like=gone")))[0] == ()


@pytest.mark.slow
def test_the_page_opens_with_the_existing_collections_and_encoders(fake, page_of, monkeypatch):
    client = fake()

    async def collections():
        return [Collection(name, "tiny", [], 2, 9, 0, "none", 1) for name in ("shop", "attic", "shop")]

    async def models():
        return [{"id": "tiny"}, {"id": "other"}]

    monkeypatch.setattr(client, "collections", collections)
    monkeypatch.setattr(client, "models", models)
    *_, collection, encoder, beside = asyncio.run(callback(page_of(client), "start")(Address("beside=other")))
    assert (collection["choices"], collection["value"]) == (["attic", "shop"], "attic")
    assert (encoder["value"], beside["value"], encoder["visible"], beside["visible"]) == ("tiny", "other", True, True)


@pytest.mark.slow
def test_a_selection_is_saved_as_a_file_to_download(fake, uploads, event, page_of):
    page = page_of(fake())
    selection = {"all": False, "chosen": [["id2", "0.5"]]}
    link = asyncio.run(callback(page, "export")(event(format="csv", **selection), gr.Progress(), *USUAL))
    path = re.search(r'file=([^"]*)" download="twinview.csv"', link)[1]
    assert Path(path).read_text().splitlines()[1] == "id2,pets/cat 2.jpg,cat,0.5,"
    assert 'download="twinview-paths.txt"' in (
        asyncio.run(callback(page, "export")(event(format="paths", **selection), gr.Progress(), *USUAL))
    )


@pytest.mark.slow
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
    assert "the service failed" in asyncio.run(callback(page, "show")((), 0, *USUAL))[3]


@pytest.mark.slow
def test_mounted_in_a_locked_service_the_page_needs_a_key_and_its_own_requests_none(in_loop):
    service = FastAPI()
    service.add_middleware(RequireAccess, access=Access.from_keys("secret"))

    @service.get("/collections/pictures/items")
    async def items():
        return {"count": 1, "items": [{"id": "id1", "name": "pets/cat 1.jpg", "label": "cat", "path": None}]}

    page = next(route.app for route in in_loop(mount, service).routes if getattr(route, "path", None) == "/ui")
    assert "cat 1.jpg" in asyncio.run(callback(page.get_blocks(), "show")((), 0, *USUAL))[3]
    http = TestClient(service)
    for path in ("/ui/", "/ui/config", "/ui/gradio_api/info"):
        assert http.get(path).status_code == 401
        assert http.get(path, auth=("", "secret")).status_code == 200


@pytest.mark.slow
def test_nothing_is_reported_and_nothing_shared(fake, alone):
    with alone(fake()) as client:
        options = config(client)
        assert options["analytics_enabled"] is False
        assert options["footer_links"] == [] and options["run_history"] is False and options["mcp_server"] is False
        assert options["stylesheets"] == []
        assert "http" not in client.get("/ui/theme.css").text.replace("http://www.w3.org/", "")
        offered = client.get("/ui/gradio_api/info").json()
        assert {"/similar", "/collection"} <= set(offered["named_endpoints"]) and offered["unnamed_endpoints"] == {}


@pytest.mark.slow
def test_alone_the_page_passes_thumbnails_on(fake, alone):
    with alone(fake()) as client:
        answer = client.get("/collections/pictures/items/id1/thumbnail")
        assert (answer.content, answer.headers["content-type"]) == (b"a thumbnail", "image/jpeg")
        large = client.get("/collections/pets/items/id1/original", params={"model": "other"})
        assert (large.content, large.headers["content-type"]) == (b"the original id1 pets other", "image/jpeg")
        assert client.get("/").url.path == "/ui/"
    with alone(fake(failure=ServiceError("the service cannot be reached"))) as client:
        answer = client.get("/collections/pictures/items/id1/thumbnail")
        assert (answer.status_code, answer.text) == (502, "the service cannot be reached")
        assert client.get("/collections/pets/items/id1/original").status_code == 502


def test_a_port_in_use_is_reported_in_one_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=f"^Port {port} cannot be used .*; choose another with --port.$"):
            main(PageOptions(port=port))
    with pytest.raises(SystemExit, match=r"^Port 99999 cannot be used"):
        main(PageOptions(port=99999))


@pytest.mark.slow
def test_alone_the_page_is_locked_as_a_service_is(in_loop, monkeypatch):
    """And asks the service with a key of its own."""
    made, clients = [], []
    monkeypatch.setattr("uvicorn.Config", lambda app, **_: made.append(app))
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("uvicorn.Server.__init__", lambda *_: None)
    monkeypatch.setattr(app, "standalone", lambda client: clients.append(client) or in_loop(standalone, client))
    monkeypatch.setenv("TWINVIEW_API_KEY", "the service's")
    main(PageOptions(port=0))
    monkeypatch.setenv("TWINVIEW_API_KEYS", "the page's")
    main(PageOptions(port=0))
    assert clients[0]._http.headers["Authorization"] == "Bearer the service's"
    assert TestClient(made[0]).get("/ui/").status_code == 200
    assert TestClient(made[0], base_url="http://evil.example").get("/ui/").status_code == 403
    assert TestClient(made[1]).get("/ui/").status_code == 401
    assert TestClient(made[1]).get("/ui/", auth=("", "the page's")).status_code == 200
    monkeypatch.setenv("TWINVIEW_API_KEYS_FILE", "/nowhere/keys")
    with pytest.raises(SystemExit, match=r"^error: TWINVIEW_API_KEYS_FILE: /nowhere/keys cannot be read$"):
        main(PageOptions(port=0))


@pytest.mark.slow
def test_the_script_explains_itself(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(PageOptions, description=app.__doc__, args=["--help"])
    help_text = capsys.readouterr().out
    assert "--service" in help_text and "--port" in help_text and "bentoml serve" in help_text
