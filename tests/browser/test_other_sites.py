"""A page of another website, open in the browser that has the page open too: it reads nothing and changes nothing."""

import http.server
import json
import re
import threading

import httpx
import pytest

from serving.client import Client

COMMANDS = True  # they have the access control of a real start

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:.future.no_silent_downcasting"),  # Gradio's, of pandas
]

ATTACKS = """async ({ port, paths, ids, component }) => {
    const seen = [];
    const removal = JSON.stringify({
        session_hash: "x", component_id: component, fn_name: "act",
        data: { kind: "remove", collection: "pictures", chosen: { ids } } });
    const loads = (tag, url) => new Promise((done) => {
        const element = document.createElement(tag);
        element.onload = () => done(tag !== "iframe");
        element.onerror = () => done(false);
        element.src = url;
        document.body.append(element);
    });
    const posts = (url, name, value) => new Promise((done) => {
        const frame = document.createElement("iframe");
        frame.name = `frame${Math.random()}`;
        document.body.append(frame);
        const form = document.createElement("form");
        Object.assign(form, { method: "post", action: url, target: frame.name, enctype: "text/plain" });
        const field = document.createElement("input");
        Object.assign(field, { name, value });
        form.append(field);
        document.body.append(form);
        frame.onload = () => done();
        form.submit();
    });
    const opens = (socket) => new Promise((done) => {
        socket.onopen = socket.onmessage = () => done(true);
        socket.onerror = () => done(false);
    });
    for (const host of ["127.0.0.1", "localhost", "x.localhost"]) {
        const base = `http://${host}:${port}`;
        const read = async (path, options) => {
            try {
                const answer = await fetch(base + path, { credentials: "include", ...options });
                if (answer.type !== "opaque") seen.push([host, path, options, answer.status]);
            } catch (error) {}
        };
        for (const path of paths) {
            await read(path);
            await read(path, { mode: "no-cors" });
        }
        const target = "/ui/gradio_api/component_server";
        for (const headers of [{ "Content-Type": "text/plain" }, { "Content-Type": "application/json" }]) {
            await read(target, { method: "POST", headers, body: removal });
        }
        await read(target, { method: "POST", mode: "no-cors", body: removal });
        await read("/collections/pictures/items", {
            method: "DELETE", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ids }) });
        // A form's text/plain body is NAME=VALUE: the = goes into a field that is ignored.
        await posts(base + target, removal.slice(0, -1) + ',"x":"', '"}');
        await posts(`${base}/collections/pictures/map`, "x", "1");
        for (const path of paths) {
            if (await loads("img", base + path)) seen.push([host, path, "img"]);
            if (await loads("script", base + path)) seen.push([host, path, "script"]);
        }
        for (const path of ["/ui/", "/docs"]) await loads("iframe", base + path);
        if (await opens(new EventSource(`${base}/ui/gradio_api/heartbeat/x`, { withCredentials: true }))) {
            seen.push([host, "EventSource"]);
        }
        if (await opens(new WebSocket(`${base.replace("http", "ws")}/ui/ws`))) seen.push([host, "WebSocket"]);
    }
    return seen;
}"""


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><body>another website</body>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere() -> int:
    """The port of another website on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def remover(url: str, auth: tuple[str, str] | None) -> int:
    """The id of the component whose server function deletes items."""
    page = httpx.get(f"{url}/ui/", auth=auth).text
    config = json.loads(re.search(r"window.gradio_config = (\{.*?\});</script>", page)[1])
    return next(one["id"] for one in config["components"] if "act" in one["props"].get("server_fns", []))


@pytest.mark.parametrize("host", ["evil.localhost", "localhost", "127.0.0.1"])
@pytest.mark.parametrize("kind", ["service", "alone", "locked"])
def test_a_page_of_another_site_reads_nothing_and_deletes_nothing(servers, locked, browser, elsewhere, kind, host):
    url = locked if kind == "locked" else getattr(servers, kind)
    auth = ("anybody", "secret") if kind == "locked" else None
    with Client(servers.service) as client:
        items = client.items().items
    credentials = {"username": auth[0], "password": auth[1]} if auth else None
    context = browser.new_context(http_credentials=credentials)
    try:
        page = context.new_page()
        page.goto(f"{url}/ui/")  # the browser now remembers the key
        page.wait_for_selector("#grid .tile")
        page.goto(f"http://{host}:{elsewhere}/")
        thumbnail = f"/collections/pictures/items/{items[0].id}/thumbnail"
        given = {
            "port": int(url.rpartition(":")[2]),
            "paths": ["/ui/", "/ui/config", "/collections", "/collections/pictures/items", thumbnail, "/readyz"],
            "ids": [item.id for item in items[:3]],
            "component": remover(url, auth),
        }
        assert page.evaluate(ATTACKS, given) == []
        shown = [frame.locator("#grid, #swagger-ui").count() for frame in page.frames if frame != page.main_frame]
        assert not any(shown)
    finally:
        context.close()
    with Client(servers.service) as client:
        assert client.items().count == len(items)


def test_a_link_on_another_site_opens_the_page(servers, browser, elsewhere):
    page = browser.new_page()
    page.goto(f"http://evil.localhost:{elsewhere}/")
    page.evaluate("url => { location.href = url; }", f"{servers.service}/ui/")
    page.wait_for_selector("#grid .tile")
    page.close()
