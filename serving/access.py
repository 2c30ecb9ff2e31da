"""Who is answered: those with an API key or, without keys, programs and browsers on the service's own machine.

    TWINVIEW_API_KEYS        the keys as keys.py describes them, separated by commas
    TWINVIEW_API_KEYS_FILE   a file with one key per line; empty lines and lines that begin with # are ignored
    TWINVIEW_OPEN=1          without keys, answer everyone who can reach the service
    TWINVIEW_PROXY=1         without keys, trust a proxy on this machine to say who its clients are
    TWINVIEW_ORIGINS         other websites whose pages may use the service, for example https://shop.example,
                             separated by commas

Clients send a key as `Authorization: Bearer KEY`, or as the password of Basic authentication with any user name: a
browser shows a dialog for it. /livez and /readyz need no key.

Without keys a request is answered if it arrived at a loopback address, whatever address the service listens on.
Requests from other machines, or into a container, arrive at other addresses. What a proxy passes on also arrives at a
loopback address, or at a unix socket, whoever sent it. So such requests are refused, unless TWINVIEW_PROXY is set; then
the last entry of X-Forwarded-For is the client's address, and must be a loopback address too.

Any website can make the browser of its visitors send requests to this machine. With or without keys, the service
refuses what a browser sends for a page of another site: the browser says so in the headers Origin and Sec-Fetch-Site,
which the page cannot change. Only links to the pages in LINKED work. A website could also point its own name to
127.0.0.1 (DNS rebinding), and would then be the same site. So without keys the Host header must be localhost or a
loopback address.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import errors
from serving.errors import Closed, NoKey, Refusal
from serving.keys import ApiKeys, KeyProblem
from serving.limits import SettingProblem, is_on
from serving.protocol import hosts
from serving.protocol.hosts import is_loopback

OPEN_PATHS = ("/livez", "/readyz")
LINKED = ("/", "/ui", "/ui/", "/docs")  # pages that a link on another website may open
FORWARDING = (b"forwarded", b"via", b"x-real-ip")  # headers that proxies add, besides x-forwarded-...
READABLE = ("Retry-After", "Server-Timing", "Twinview-Model", "X-Request-Id")  # headers, by pages of TWINVIEW_ORIGINS
HOST_AND_PORT = re.compile(r"([^\s@/:\[\]]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
CHALLENGES = ('Bearer realm="twinview"', 'Basic realm="twinview", charset="UTF-8"')
HOW_TO_OPEN = "set TWINVIEW_API_KEYS or TWINVIEW_API_KEYS_FILE, or TWINVIEW_OPEN=1 to answer everyone"
LOCALHOST = "localhost"
FROM_ELSEWHERE = f"this service has no API keys, so it answers requests from its own machine only; {HOW_TO_OPEN}"
THROUGH_PROXY = (
    "this service has no API keys, and this request came through a proxy, perhaps from another machine; "
    f"{HOW_TO_OPEN}, or TWINVIEW_PROXY=1 if the proxy is on this machine and sets X-Forwarded-For"
)
READ_ONLY = "this API key may only read; adding, changing and deleting items needs another one"
WRITING = ("PUT", "PATCH", "DELETE")  # a POST changes no item: it searches, embeds or starts a computation
KEY = "twinview.key"  # key in the ASGI scope with the name of the request's API key
INTERNAL = "twinview.internal"  # key in the ASGI scope that marks requests that this process makes to itself


MAY_WRITE: ContextVar[bool | None] = ContextVar("may_write", default=None)
"""Whether the client of the current request may change items. None outside of requests."""


class AccessProblem(ValueError):
    """A setting that cannot be used. The message names the variable, never a key."""


@dataclass(frozen=True)
class Access:
    keys: ApiKeys = field(default_factory=ApiKeys)
    open: bool = False
    """Whether everyone is answered if there are no keys."""
    proxy: bool = False
    """Whether a proxy on this machine is trusted if there are no keys."""
    origins: tuple[str, ...] = ()
    """Other websites whose pages may use the service."""

    @classmethod
    def from_keys(cls, *keys: str) -> "Access":
        return cls(ApiKeys(keys))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Access":
        """Raises AccessProblem when a file cannot be read, or a variable has no key or a value that is not allowed."""
        given, file = environment.get("TWINVIEW_API_KEYS", ""), environment.get("TWINVIEW_API_KEYS_FILE")
        variable = "TWINVIEW_API_KEYS"
        try:
            keys = ApiKeys(given.split(","))
            if file:
                variable = "TWINVIEW_API_KEYS_FILE"
                keys = ApiKeys(given.split(","), file)
        except KeyProblem as error:
            raise AccessProblem(f"{variable}: {error}") from error
        if given and not keys:
            raise AccessProblem("TWINVIEW_API_KEYS is set and holds no key")
        origins = [origin.strip() for origin in environment.get("TWINVIEW_ORIGINS", "").split(",")]
        return cls(
            keys,
            _is_on(environment, "TWINVIEW_OPEN"),
            _is_on(environment, "TWINVIEW_PROXY"),
            tuple(_checked_origin(origin) for origin in origins if origin),
        )

    def middleware(self) -> list[Middleware]:
        """The layers that decide who is answered, the outermost first. Any app that is reachable needs all of them."""
        return [
            Middleware(RefuseOtherSites, access=self),
            # Without origins it adds no header, and makes Gradio leave out its own.
            Middleware(
                CORSMiddleware,
                allow_origins=self.origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=READABLE if self.origins else (),
            ),
            Middleware(RequireAccess, access=self),
        ]

    def refusal(self, scope: Scope) -> Refusal | None:
        """Returns why the request is refused; None if it is not. Notes the key's name in the scope."""
        headers = dict(scope["headers"])
        if not self.keys:
            MAY_WRITE.set(True)
            return None if self.open else self._refuse_remote(scope, headers)
        if INTERNAL in scope:  # from the page, for one of its visitors
            return None if MAY_WRITE.get() or scope["method"] not in WRITING else Closed(READ_ONLY)
        secret = _key(headers.get(b"authorization", b""))
        if secret is None:
            return NoKey("this service requires an API key, as Authorization: Bearer KEY or as the password of Basic")
        key = self.keys.find(secret)
        if key is None:
            return NoKey("the API key is not one of this service's keys")
        scope[KEY] = key.name
        MAY_WRITE.set(key.may_write)
        return None if key.may_write or scope.get("method") not in WRITING else Closed(READ_ONLY)

    def _refuse_remote(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Closed | None:
        """Returns why a request to a service without keys is refused; None if it was made on this machine."""
        if INTERNAL in scope:
            return None
        address = (scope.get("server") or ("",))[0]  # where it arrived; the path of a unix socket
        socket = hosts.address(address) is None and address != LOCALHOST
        if socket or any(name in FORWARDING or name.startswith(b"x-forwarded-") for name in headers):
            if not self.proxy:
                return Closed(THROUGH_PROXY)
            client = headers.get(b"x-forwarded-for", b"").decode("latin-1").rpartition(",")[2].strip()
            if not is_loopback(_without_port(client)):
                return Closed(FROM_ELSEWHERE)
            address = LOCALHOST if socket else address
        return _refuse_names(address, headers.get(b"host", b"").decode("latin-1"))

    def refuse_other_site(self, scope: Scope) -> Closed | None:
        """Returns why a request is refused that a browser sends for a page of another site; None for all others."""
        headers = dict(scope["headers"])
        site, origin = headers.get(b"sec-fetch-site", b"none"), headers.get(b"origin", b"").decode("latin-1")
        foreign = site not in (b"none", b"same-origin")
        if (not origin and not foreign) or origin in self.origins:
            return None
        if not origin and _opens_page(scope, headers):
            return None
        if origin and not foreign and _host(origin) == _host(origin, headers.get(b"host", b"").decode("latin-1")):
            return None
        page = f"a page of {origin[:100]}" if origin else "another site"
        return Closed(f"this request was sent for {page}; TWINVIEW_ORIGINS names other sites that may use this service")


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    """Raises AccessProblem."""
    try:
        return is_on(environment, name)
    except SettingProblem as error:
        raise AccessProblem(str(error)) from error


def _checked_origin(origin: str) -> str:
    """As a browser writes it. Raises AccessProblem."""
    parts = urlsplit(origin.rstrip("/").lower())
    plain = f"{parts.scheme}://{parts.netloc}"
    if parts.scheme not in DEFAULT_PORTS or not HOST_AND_PORT.fullmatch(parts.netloc) or parts.geturl() != plain:
        raise AccessProblem(f"TWINVIEW_ORIGINS: {origin} is not an origin like https://shop.example:8443")
    return parts.geturl().removesuffix(DEFAULT_PORTS[parts.scheme])


def _host(origin: str, host: str | None = None) -> str:
    """The host with its port, unless it is the default one; by default the origin's."""
    scheme, _, own = origin.lower().partition("://")
    return (own if host is None else host.lower()).removesuffix(DEFAULT_PORTS.get(scheme, ""))


def _opens_page(scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a visitor followed a link to a page of this service. Nothing can be read or changed this way."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    goal = headers.get(b"sec-fetch-mode"), headers.get(b"sec-fetch-dest")
    return scope.get("method") in ("GET", "HEAD") and path in LINKED and goal == (b"navigate", b"document")


def _key(authorization: bytes) -> bytes | None:
    scheme, _, value = authorization.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            pass
    return None


@lru_cache(256)
def _refuse_names(address: str, host: str) -> Closed | None:
    """address  where the request arrived
    host     its Host header
    """
    if not is_loopback(address):
        return Closed(FROM_ELSEWHERE)
    name = _without_port(host)
    if not is_loopback(name):
        return Closed(f"this service has no API keys, so it refuses the host name {name[:100]}; {HOW_TO_OPEN}")
    return None


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and (":" not in name or name.endswith("]")) else host


class RefuseOtherSites:
    """ASGI middleware: responds 403 to what a browser sends for pages of other sites."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None if scope["type"] == "lifespan" else self.access.refuse_other_site(scope)
        await (_refuse(refusal, scope, receive, send) if refusal else self.app(scope, receive, send))


class RequireAccess:
    """ASGI middleware: responds 401 or 403 to requests that `access` refuses."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS:
            return await self.app(scope, receive, send)
        refusal = self.access.refusal(scope)
        if refusal is None:
            return await self.app(scope, receive, send)
        await _refuse(refusal, scope, receive, send)


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})  # not accepted, so the client sees 403
    response = errors.response(refusal)
    if refusal.status == 401:
        for challenge in CHALLENGES:  # one header each: not every browser finds the second in a shared one
            response.headers.append("WWW-Authenticate", challenge)
    await response(scope, receive, send)


def internal(app: ASGIApp) -> ASGIApp:
    """Wraps the app for requests that this process makes to itself: they need no key. Clients cannot set the scope."""

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, INTERNAL: True}, receive, send)

    return asgi
