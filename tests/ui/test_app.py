import asyncio
import errno
import inspect
import json
import math
import re
import socket
from functools import partial
from pathlib import Path

import gradio as gr
import gradio.route_utils
import pytest
import tyro
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request

from serving.access import Access, RequireAccess
from serving.client import AsyncClient, Collection, ServiceError
from serving.connection import Connection
from ui import app, streams
from ui.app import PageOptions, build, mount, serve, standalone
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
        shown = asyncio.run(callback(page_of(AsyncClient(url)), "show")((), 60, False, *USUAL))
    assert f"the service at {url} cannot be reached" in shown[5]


@pytest.mark.slow
def test_nothing_is_fetched_that_a_visitor_names(fake, alone):
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.listen()
        elsewhere.settimeout(0.2)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/secret"
        for way in (
            f"file={url}",
            f"file={url.replace('http', 'https')}",
            f"file/{url}",
            f"file//{url}",
            f"proxy={url}",
        ):
            assert alone(fake()).get(f"/ui/gradio_api/{way}").status_code == 404
        with pytest.raises(TimeoutError):
            elsewhere.accept()


@pytest.mark.slow
def test_the_page_offers_only_the_routes_that_it_needs(fake, alone):
    with alone(fake()) as client:
        for path in ("monitoring/summary", "monitoring", "login_check", "gradio_api/queue/status", "gradio_api/user"):
            assert client.get(f"/ui/{path}").status_code == 404, path
        for path in ("static", "assets"):
            assert client.get(f"/ui/{path}/{'a' * 300}").status_code == 404
        for path in (
            "login",
            "gradio_api/run/similar",
            "gradio_api/call/nope",
            "gradio_api/call/show",
            "gradio_api/vibe-edit",
        ):
            assert client.post(f"/ui/{path}", json={"data": []}).status_code == 404, path


@pytest.mark.slow
def test_events_are_answered_in_the_stream(fake, alone, monkeypatch):
    monkeypatch.setattr(streams, "QUIET_S", 0.01)
    monkeypatch.setattr(streams, "LEAVE_S", 0.01)
    with alone(fake()) as client:
        start = next(one["id"] for one in config(client)["dependencies"] if one["targets"][0][1] == "load")
        client.post(f"/ui{streams.ADD}", json={"data": [], "fn_index": start, "session_hash": "a1"})
        lines = client.get(f"/ui{streams.STREAM}?session_hash=a1").text.split("\n\n")
    answers = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert answers[-2]["msg"] == "process_completed" and answers[-2]["success"]
    assert answers[-1]["msg"] == "close_stream"


@pytest.mark.slow
def test_requests_that_gradio_does_not_understand_are_400_and_faults_of_ours_500(fake, alone, monkeypatch):
    with alone(fake()) as client:
        client = TestClient(client.app, "http://127.0.0.1", raise_server_exceptions=False)
        post = partial(client.post, "/ui/gradio_api/component_server")
        call = {"session_hash": "x", "component_id": 99999, "fn_name": "facts", "data": {}}
        answers = [
            post(json=call),
            post(files={"a": ("b", b"c")}),
            client.post("/ui/gradio_api/queue/join", json={"data": [], "fn_index": 99999, "session_hash": "x"}),
        ]
        assert [(answer.status_code, answer.text) for answer in answers] == [
            (400, "the page does not understand this request")
        ] * 3
        facts = next(one for one in config(client)["components"] if "facts" in one["props"].get("server_fns", []))
        assert post(json=call | {"component_id": facts["id"], "data": None}).status_code == 500


@pytest.mark.slow
def test_no_program_has_a_picture_fetched_from_elsewhere(fake, alone):
    picture = {"path": "https://example.com/cat.png", "meta": {"_type": "gradio.FileData"}}
    with alone(fake()) as client:
        call = "/ui/gradio_api/call/similar"
        event = client.post(call, json={"data": [picture, [], [], 3, 0, [], "pictures", None, ""]}).json()["event_id"]
        assert "this page loads nothing from other addresses" in client.get(f"{call}/{event}").text


@pytest.mark.slow
def test_programs_get_results_and_readable_errors(fake, alone, uploads):
    with alone(fake()) as client:

        def ask(name: str, *data) -> str:
            call = f"/ui/gradio_api/call/{name}"
            return client.get(f"{call}/{client.post(call, json={'data': data}).json()['event_id']}").text

        found = json.loads(ask("similar", None, ["id1"], [], 2, 0, [], "pictures", None, "").split("data: ")[1])[0]
        assert [(item["id"], item["similarity"]) for item in found] == [("id0", 1.0), ("id2", 0.875)]
        listed = json.loads(ask("collection", ["label=cat"], 3, 2, "pictures", None).split("data: ")[1])[0]
        assert (listed["count"], [item["id"] for item in listed["items"]]) == (100, ["id2", "id3", "id4"])
        assert "label= is not a condition like label=shirt" in ask("collection", ["label="], 3, 0, "pictures", None)
        elsewhere = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        assert "event: error" in ask("similar", elsewhere, [], [], 2, 0, [], "pictures", None, "")


@pytest.mark.slow
def test_the_services_own_message_is_shown_if_there_is_no_encoder(fake, page_of):
    failure = ServiceError("There is no encoder. Make one with `python training/pretrain.py`.", 503, "not_ready")
    shown = asyncio.run(callback(page_of(fake(failure=failure)), "show")((), 60, False, *USUAL))
    assert "There is no encoder. Make one with <code>python training/pretrain.py</code>." in shown[5]


@pytest.mark.slow
def test_a_refused_picture_is_reported_and_taken_off_the_trail(fake, uploads, event, page_of):
    (uploads / "notes.txt").write_text("no picture")
    refusal = ServiceError("image (<notes>.txt) is not an image of a format this reads", 422, "undecodable", "image")
    page, before = page_of(fake(failure=refusal)), (Query((Picture("mine.jpg", id="id9"),)),)
    trail = callback(page, "upload")(before, event(paths=[str(uploads / "notes.txt")]))
    with pytest.warns(UserWarning, match=r"image \(&lt;notes&gt;.txt\) is not an image"):
        trail, *others = asyncio.run(callback(page, "show")(trail, 60, "", *USUAL))
    assert trail == before and all(other == gr.skip() for other in others)


@pytest.mark.slow
def test_a_failure_of_the_service_is_shown_instead_of_results_and_keeps_the_trail(fake, page_of):
    page, trail = page_of(fake(failure=ServiceError("the service is busy", 429))), (Query((Picture("a", id="id9"),)),)
    answer = asyncio.run(callback(page, "show")(trail, 60, "", *USUAL))
    assert answer[0] == gr.skip() and "the service is busy" in answer[5]


@pytest.mark.slow
def test_an_invalid_condition_is_reported_and_leaves_the_results(fake, page_of):
    show = callback(page_of(client := fake()), "show")
    trail, shown, picking, problem, *others = asyncio.run(show((), 60, "", 24, 0, 0, ["label="], "pictures", None, ""))
    assert "label= is not a condition like label=shirt" in problem
    assert all(other == gr.skip() for other in (trail, shown, picking, *others))
    client.failure = ServiceError("no item has the key labl", 400, "invalid_request", "filter")
    _, _, _, problem, *others = asyncio.run(show((), 60, "", *USUAL))
    assert "no item has the key labl" in problem and all(other == gr.skip() for other in others)
    client.failure = None
    assert asyncio.run(show((), 60, "", *USUAL))[3] == "", "a condition that is valid takes the message away"


@pytest.mark.slow
def test_the_limit_is_a_rank_where_ranks_are_known_and_a_cosine_elsewhere(fake, page_of):
    client, trail = fake(), (Query((Picture("a", id="id0"),)),)
    show = callback(page_of(client), "show")

    def shown(trail, least=0.0, closer=0.0) -> tuple[bool, bool]:
        answer = asyncio.run(show(trail, 60, "", 24, least, closer, [], "pictures", None, ""))
        return answer[8]["visible"], answer[9]["visible"]

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
def test_pictures_to_label_are_suggested_until_a_search_or_all_are_shown(fake, event, page_of):
    client = fake()
    page = page_of(client)
    assert [callback(page, "pick")(event(show=which)) for which in ("first", "off", None)] == ["first", "", ""]
    show = callback(page, "show")
    _, _, picking, _, heading, tiles, *_ = asyncio.run(show((), 60, "first", 5, 0, 0, ["label=cat"], "pets", None, ""))
    assert picking and client.asked[-1] == ("pick", 5, {"label": {"in": ["cat"]}}, "pets")
    assert "5 pictures of the 9 without a label" in heading and tiles.count("<li>") == 5
    assert 'data-pick="off"' in tiles and 'data-pick="first"' in asyncio.run(show((), 60, "", *USUAL))[5]
    trail = (Query((Picture("a", id="id0"),)),)
    assert asyncio.run(show(trail, 60, "first", *USUAL))[2] == "", "Back from the search shows all pictures"
    client.all = []
    assert "has a label" in asyncio.run(show((), 60, "first", *USUAL))[5]


@pytest.mark.slow
def test_labels_are_suggested_and_those_of_a_kind_are_together(fake, event, page_of):
    client = fake()
    page = page_of(client)
    assert callback(page, "pick")(event(show="suggested")) == "suggested"
    show = callback(page, "show")
    _, _, picking, _, heading, tiles, *_ = asyncio.run(
        show((), 60, "suggested", 5, 0, 0, ["label=cat"], "pets", None, "")
    )
    assert picking == "suggested" and client.asked[-1] == ("suggest", 5, {"label": {"in": ["cat"]}}, "pets")
    assert "For 5 pictures of the 9 without a label, each by" in heading
    assert re.findall(r'data-suggested="([^"]+)"', tiles) == ["a&quot;cat", "a&quot;cat", "a&quot;cat", "dog", "dog"]
    assert re.findall(r'class="score">(\d+%)</span><span class="label">([^<]+)', tiles)[0] == ("100%", "a&quot;cat?")
    assert all(f'data-{what}"' in tiles for what in ('act="confirm', 'pick="off'))
    client.all = []
    assert "has a label" in asyncio.run(show((), 60, "suggested", *USUAL))[5]
    client.failure = ServiceError("pets has no labels; label some", 400, "invalid_request", "name")
    tiles = asyncio.run(show((), 60, "suggested", *USUAL))[5]
    assert "Pets has no labels" in tiles.replace("pets", "Pets") and 'data-pick="off"' in tiles, "one can go back"


@pytest.mark.slow
def test_odd_pictures_are_shown_by_kind_and_doubtful_labels_can_be_confirmed(fake, event, page_of):
    client = fake()
    page = page_of(client)
    show, kinds = callback(page, "show"), ("outliers", "labels", "broken")
    assert [callback(page, "pick")(event(show=which)) for which in (*kinds, "odd")] == [*kinds, ""]
    seen = {}
    for kind in kinds:
        _, _, picking, _, heading, tiles, *_ = asyncio.run(show((), 60, kind, 5, 0, 0, ["label=cat"], "pets", None, ""))
        assert picking == kind and client.asked[-1] == ("odd", kind, 5, {"label": {"in": ["cat"]}}, "pets")
        assert "5 pictures of 9, " in heading and tiles.count("<li>") == 5
        pressed = re.findall(r'data-pick="(\w+)" aria-pressed="(\w+)"', tiles)
        assert pressed == [(one, str(one == kind).lower()) for one in kinds] and 'data-pick="off"' in tiles
        seen[kind] = re.findall(r'class="score">([^<]+)</span><span class="label">([^<]+)', tiles)[0]
        assert ('data-act="confirm"' in tiles) == ('data-suggested="d&lt;og"' in tiles) == (kind == "labels")
    assert seen == {"outliers": ("3.00", "cat"), "labels": ("75%", "d&lt;og?"), "broken": ("blurred", "cat")}
    client.all = []
    assert "seems to be broken" in asyncio.run(show((), 60, "broken", *USUAL))[5]
    client.failure = ServiceError("pets has 3 of the 4 pictures that are needed", 400, "invalid_request", "name")
    tiles = asyncio.run(show((), 60, "outliers", *USUAL))[5]
    assert "3 of the 4" in tiles and 'data-pick="off"' in tiles, "one can go back"


@pytest.mark.slow
def test_no_event_is_dropped_or_handled_with_the_data_of_another(fake, page_of):
    """Gradio drops events during an earlier one with "once", and repeats the first one's data with "always_last"."""
    listeners = [one for one in page_of(fake()).fns.values() if one.api_visibility == "private"]
    data = (gr.EventData, gr.SelectData)
    took = {one: any(p.annotation in data for p in inspect.signature(one.fn).parameters.values()) for one in listeners}
    assert sum(took.values()) >= 10
    for one, takes_data in took.items():
        assert one.trigger_mode in (("multiple",) if takes_data else ("multiple", "always_last")), one.name


@pytest.mark.slow
def test_changes_of_the_searches_so_far_wait_for_each_other(fake, page_of):
    page = page_of(fake())
    trail = next(one for one in page.fns.values() if one.name == "click").outputs[0]
    changing = [
        one
        for one in page.fns.values()
        if trail in one.outputs and one.name not in ("show", "show_first_page", "start")
    ]
    assert len(changing) >= 10
    for one in changing:
        assert (one.concurrency_limit, one.concurrency_id) == (1, "trail"), one.name


@pytest.mark.slow
def test_more_adds_to_what_is_shown_until_all_is(fake, page_of):
    page = page_of(fake())
    _, shown, _, _, heading, tiles, *_, more = asyncio.run(callback(page, "show")((), 60, False, *USUAL))
    assert (shown, tiles.count("<li>"), more["visible"]) == (60, 60, True) and "60 of 100 pictures" in heading
    _, shown, _, _, heading, tiles, *_, more = asyncio.run(callback(page, "show")((), 120, False, *USUAL))
    assert (shown, tiles.count("<li>"), more["visible"]) == (120, 100, False) and "<p>100 pictures." in heading
    assert asyncio.run(callback(page, "show_first_page")((), False, *USUAL))[1] == 60


@pytest.mark.slow
def test_the_browsers_back_and_forward_return_to_a_search(fake, page_of, event):
    navigate = callback(page_of(fake()), "navigate")
    mine, cat = (Query((Picture(name, id=id),)) for name, id in (("mine.jpg", "id9"), ("pets/cat 2.jpg", "id2")))

    def at(trail, steps: int, query: str):
        return asyncio.run(navigate(trail, "pictures", event(steps=steps, query=query)))

    assert at((mine, cat), 1, "?like=id9") == (mine,)
    assert at((mine, cat), 0, "") == ()
    cat = Query((Picture("pets/cat 2.jpg", "cat", id="id2"),))
    assert at((mine,), 2, "?like=id2") == (mine, cat), "forward: it is read from the address"
    assert at((), 2, "?like=id2") == (cat,), "of a page that was loaded again"
    assert at((mine,), 2, "") == (mine,), "a search by an uploaded picture has no address"
    with pytest.warns(UserWarning, match="no item gone is in the collection"):
        assert at((mine,), 2, "?like=gone") == (mine,)


@pytest.mark.slow
def test_the_page_opens_with_the_search_of_its_address(fake, page_of):
    start = callback(page_of(fake()), "start")
    address = Address("like=id3&k=7&closer=0.985&where=label=cat")
    trail, k, least, closer, where, collection, encoder, beside = asyncio.run(start(address))
    assert trail == (Query((Picture("pets/cat 3.jpg", "cat", id="id3"),)),)
    assert (k, least, closer["value"], where["value"]) == (7, 0, 0.985, ["label=cat"])
    assert "label=cat (100)" in [shown for shown, _ in where["choices"]] and "Keys: label" in where["info"]
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
    page = next(route.app for route in service.routes if getattr(route, "path", None) == "/ui").app.app.get_blocks()
    assert "the service failed" in asyncio.run(callback(page, "show")((), 60, False, *USUAL))[5]


@pytest.mark.slow
def test_mounted_in_a_locked_service_the_page_needs_a_key_and_its_own_requests_none(in_loop):
    service = FastAPI()
    service.add_middleware(RequireAccess, access=Access.from_keys("secret"))

    @service.get("/collections/pictures/items")
    async def items():
        return {"count": 1, "items": [{"id": "id1", "name": "pets/cat 1.jpg", "label": "cat", "path": None}]}

    page = next(route.app for route in in_loop(mount, service).routes if getattr(route, "path", None) == "/ui").app.app
    assert "cat 1.jpg" in asyncio.run(callback(page.get_blocks(), "show")((), 60, False, *USUAL))[5]
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
            serve(PageOptions(port=port))
    with pytest.raises(SystemExit, match=r"^Port 99999 cannot be used"):
        serve(PageOptions(port=99999))


@pytest.mark.slow
def test_alone_the_page_is_locked_as_a_service_is(in_loop, monkeypatch):
    """With the same limits of requests, and asks the service with a key of its own."""
    made, clients, connections = [], [], set()
    monkeypatch.setattr("uvicorn.Config", lambda app, http, **_: made.append(app) or connections.add(http))
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("uvicorn.Server.__init__", lambda *_: None)
    monkeypatch.setattr(app, "standalone", lambda client: clients.append(client) or in_loop(standalone, client))
    monkeypatch.setenv("TWINVIEW_API_KEY", "the service's")
    serve(PageOptions(port=0))
    monkeypatch.setenv("TWINVIEW_API_KEYS", "the-page's")
    serve(PageOptions(port=0))
    assert connections == {Connection}
    assert clients[0]._http.headers["Authorization"] == "Bearer the service's"
    assert TestClient(made[0], "http://127.0.0.1").get("/ui/").status_code == 200
    assert TestClient(made[0], base_url="http://evil.example").get("/ui/").status_code == 403
    assert TestClient(made[1]).get("/ui/").status_code == 401
    assert TestClient(made[1]).get("/ui/", auth=("", "the-page's")).status_code == 200
    monkeypatch.setenv("TWINVIEW_API_KEYS_FILE", "/nowhere/keys")
    with pytest.raises(SystemExit, match=r"^error: TWINVIEW_API_KEYS_FILE: /nowhere/keys cannot be read$"):
        serve(PageOptions(port=0))


@pytest.mark.slow
def test_the_script_explains_itself(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(PageOptions, description=app.__doc__, args=["--help"])
    help_text = capsys.readouterr().out
    assert "--service" in help_text and "--port" in help_text and "bentoml serve" in help_text


@pytest.fixture
def full_disk(monkeypatch):
    def full(**options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gradio.route_utils, "NamedTemporaryFile", full)


@pytest.mark.slow
def test_an_upload_to_a_full_disk_is_left_to_the_service(fake, alone, full_disk):
    """Which answers 507."""
    with alone(fake()) as client, pytest.raises(OSError, match="No space left"):
        client.post("/ui/gradio_api/upload", files={"files": ("a.png", b"abc")})


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"data": {"files": "x"}}, {"files": {"other": ("a.png", b"abc")}}])
def test_an_upload_of_other_things_than_files_is_refused_and_leaves_no_file(fake, alone, uploads, more):
    with alone(fake()) as client:
        before = {*uploads.rglob("*")}
        files = [("files", ("b.png", b"abc")), *more.get("files", {}).items()]
        answer = client.post("/ui/gradio_api/upload", files=files, data=more.get("data"))
        assert (answer.status_code, answer.text) == (400, "an upload consists of files only, in the field files")
        assert {*uploads.rglob("*")} == before


@pytest.mark.slow
def test_an_upload_that_ends_in_its_middle_leaves_no_file(fake, alone, tmp_path):
    alone(fake())  # Gradio reads uploads with our class from now on
    start = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc'
    received = []

    async def receive():
        if received:
            assert list(tmp_path.iterdir())
            return {"type": "http.disconnect"}
        received.append(start)
        return {"type": "http.request", "body": start, "more_body": True}

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    with pytest.raises(ClientDisconnect):
        asyncio.run(gradio.route_utils.upload_fn(request, tmp_path, math.inf, None))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_page_closes_its_connections_when_it_stops(fake, in_loop):
    client = fake()
    with TestClient(in_loop(standalone, client)) as page:
        assert page.get("/ui/").status_code == 200 and not client.closed
    assert client.closed
