"""The service below a path of a proxy: every address that it gives out begins with the path."""

import asyncio

import pytest

from serving.api.head import Head
from serving.client import Client
from serving.public_path import PublicPath, PublicPathProblem, public_path


@pytest.mark.parametrize(
    ("given", "path"),
    [("", ""), ("/", ""), ("/tv", "/tv"), ("tv", "/tv"), (" /tv/ ", "/tv"), ("/a/b-c_1.x", "/a/b-c_1.x")],
)
def test_the_path_is_written_with_or_without_slashes(given, path):
    assert public_path({"TWINVIEW_PUBLIC_PATH": given}) == path
    assert public_path({}) == ""


@pytest.mark.parametrize("given", ["https://example.com/tv", "/t v", "/tv?x", "/../tv", "//tv//x", "/tü"])
def test_another_text_is_refused_by_name(given):
    with pytest.raises(PublicPathProblem, match=r"TWINVIEW_PUBLIC_PATH: .* is not a path like /tv"):
        public_path({"TWINVIEW_PUBLIC_PATH": given})


@pytest.fixture
def below(monkeypatch, serve):
    monkeypatch.setenv("TWINVIEW_PUBLIC_PATH", "/tv/")
    return serve()


@pytest.mark.parametrize("prefix", ["", "/tv"])
def test_requests_are_answered_with_and_without_the_path(below, fill, picture, prefix):
    item = fill(3)[0].id
    answer = below.post(f"{prefix}/embed", content=picture(0))
    assert len(answer.json()["embeddings"]) == 1
    for path in (f"/collections/pictures/items/{item}/thumbnail", "/livez", "/docs", "/openapi.json", "/v1/models"):
        assert below.get(prefix + path).status_code == 200, path
        assert below.head(prefix + path).status_code == 200, path
    assert below.get(f"{prefix}/nowhere").status_code == 404
    assert below.get(f"{prefix}/").history[0].headers["location"].startswith("/tv/")


@pytest.mark.parametrize("prefix", ["", "/tv"])
def test_metrics_and_log_name_the_route_without_the_path(below, picture, prefix, caplog):
    caplog.set_level("INFO", "twinview.requests")
    below.post(f"{prefix}/embed", content=picture(0))
    below.get(f"{prefix}/collections/pictures")
    below.get(f"{prefix}/docs/assets/swagger-ui.css")
    text = below.get("/metrics").text
    for route in ("/embed", "/collections/{name}"):
        assert f'twinview_requests_total{{route="{route}"' in text
        assert route in [record.facts["route"] for record in caplog.records if hasattr(record, "facts")]
    assert "/tv" not in text


@pytest.mark.parametrize("prefix", ["", "/tv"])
def test_the_app_sees_the_path_as_the_browser_does(prefix):
    seen = {}

    async def app(scope, receive, send) -> None:
        seen.update(scope)

    scope = {"type": "http", "path": f"{prefix}/a b", "raw_path": f"{prefix}/a%20b".encode()}
    asyncio.run(PublicPath(app, "/tv")(scope, None, None))
    assert (seen["path"], seen["raw_path"], seen["root_path"]) == ("/tv/a b", b"/tv/a%20b", "/tv")


@pytest.mark.parametrize("prefix", ["", "/tv"])
def test_the_page_itself_decides_about_head_below_the_path_too(prefix):
    """Some of its routes send events without end, which GET would wait for."""
    methods = []

    async def app(scope, receive, send) -> None:
        methods.append(scope["method"])

    for path in ("/ui/queue", "/livez"):
        scope = {"type": "http", "method": "HEAD", "path": prefix + path, "root_path": prefix}
        asyncio.run(Head(app)(scope, None, None))
    assert methods == ["HEAD", "GET"]


def test_a_path_that_only_begins_like_it_is_another_one(below):
    assert below.get("/tvx/livez").status_code == 404
    assert below.get("/tv/tv/livez").status_code == 404


def test_the_documentation_names_the_path(below):
    assert (
        "'/tv/openapi.json'" in below.get("/docs").text
        and '"/tv/docs/assets/swagger-ui.css"' in below.get("/docs").text
    )
    document = below.get("/tv/openapi.json").json()
    assert document["servers"] == [{"url": "/tv"}] and "/embed" in document["paths"]


def test_the_keys_hold_below_the_path_too(monkeypatch, serve):
    from serving.access import Access

    monkeypatch.setenv("TWINVIEW_PUBLIC_PATH", "/tv")
    locked = serve(access=Access.from_keys("secret"))
    for prefix in ("", "/tv"):
        assert locked.get(f"{prefix}/livez").status_code == 200
        assert locked.get(f"{prefix}/v1/models").status_code == 401
        assert locked.post(f"{prefix}/embed", content=b"x").status_code == 401


def test_the_client_takes_an_address_with_a_path(monkeypatch, listen, picture):
    monkeypatch.setenv("TWINVIEW_PUBLIC_PATH", "/tv")
    port, _ = listen()
    with Client(f"http://127.0.0.1:{port}/tv/") as client:
        assert client.ready()
        assert client.embed([picture(0)]).vectors.shape == (1, 48)
