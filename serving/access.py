"""Who is answered: whoever has a key; or, where there are no keys, whoever asks from this machine.

    TWINVIEW_API_KEYS        the keys, separated by commas
    TWINVIEW_API_KEYS_FILE   a file with a key a line; empty lines and lines that begin with # are passed over
    TWINVIEW_OPEN=1          without keys, answer everybody who can reach the service

A key comes as `Authorization: Bearer KEY`, or as the password of Basic with any user name: a browser asks its owner
for that by itself, and so opens the page. /livez and /readyz are answered without one.

Without keys a request is answered where it has come in at a loopback address, whatever the service listens on: from
outside, or into a container, it has not. A website that a visitor of this machine has open could reach it there too, by
letting its own name point to 127.0.0.1; so the name that was asked for must be an address or one without a dot.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from serving import errors
from serving.errors import Closed, NoKey, Refusal

OPEN_PATHS = ("/livez", "/readyz")
CHALLENGES = ('Bearer realm="twinview"', 'Basic realm="twinview", charset="UTF-8"')
HOW_TO_OPEN = "set TWINVIEW_API_KEYS or TWINVIEW_API_KEYS_FILE, or TWINVIEW_OPEN=1 to answer everybody"
INSIDE = "twinview.inside"  # in the scope of a request that this process makes of itself


class KeyProblem(ValueError):
    """Keys that cannot be used. The message names the variable, and no key."""


@dataclass(frozen=True)
class Access:
    digests: tuple[bytes, ...] = ()
    """SHA-256 of each key."""
    open: bool = False
    """Whether everybody is answered where there are no keys."""

    @classmethod
    def of_keys(cls, *keys: str) -> "Access":
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Access":
        """raises KeyProblem, also where keys were announced and none is there"""
        keys = [key.strip() for key in environment.get("TWINVIEW_API_KEYS", "").split(",")]
        if path := environment.get("TWINVIEW_API_KEYS_FILE"):
            try:
                lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise KeyProblem(f"TWINVIEW_API_KEYS_FILE: {path} cannot be read") from error
            keys += [line.strip() for line in lines if not line.lstrip().startswith("#")]
        keys = [key for key in keys if key]
        for name in ("TWINVIEW_API_KEYS", "TWINVIEW_API_KEYS_FILE"):
            if environment.get(name) and not keys:
                raise KeyProblem(f"{name} is set and holds no key")
        return cls(cls.of_keys(*keys).digests, environment.get("TWINVIEW_OPEN", "") == "1")

    def admits(self, key: bytes) -> bool:
        """In the same time for every wrong key, however much of it is right."""
        digest = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0  # all are compared

    def refusal(self, scope: Scope) -> Refusal | None:
        """Why the request is not answered, if it is not."""
        headers = dict(scope["headers"])
        if not self.digests:
            if self.open:
                return None
            address = (scope.get("server") or ("",))[0]
            return _from_elsewhere(address, headers.get(b"host", b"").decode("latin-1"))
        given = _key(headers.get(b"authorization", b""))
        if given is None:
            return NoKey("this service wants a key, as Authorization: Bearer KEY or as the password of Basic")
        return None if self.admits(given) else NoKey("this is none of the service's keys")


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
def _from_elsewhere(address: str, host: str) -> Closed | None:
    """Why a request without a key is not answered, by the address that it has come in at and its Host header.

    address  the socket's own; a path or a name where there is none, in which case nobody outside can have reached it
    """
    if not _is_loopback(address):
        return Closed(f"this service has no API keys, so it answers on its own machine only; {HOW_TO_OPEN}")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    if "." in name and not name.lower().endswith(".localhost") and _address(name) is None:
        return Closed(f"this service has no API keys, so it is not known by the name {name[:100]}; {HOW_TO_OPEN}")
    return None


def _is_loopback(address: str) -> bool:
    ip = _address(address)
    return ip is None or ip.is_loopback or bool(getattr(ip, "ipv4_mapped", None) and ip.ipv4_mapped.is_loopback)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None


class RequireAccess:
    """ASGI middleware: 401 or 403 for whoever is not answered."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS:
            return await self.app(scope, receive, send)
        refusal = None if INSIDE in scope else self.access.refusal(scope)
        if refusal is None:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})  # before it was accepted: a plain 403
        answer = errors.answer(refusal)
        if refusal.status == 401:
            for challenge in CHALLENGES:  # a line each: not every browser finds the second in one line
                answer.headers.append("WWW-Authenticate", challenge)
        await answer(scope, receive, send)


def inside(app: ASGIApp) -> ASGIApp:
    """The app for requests that this process makes of itself: they need no key. Nothing from outside sets a scope."""

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, INSIDE: True}, receive, send)

    return asgi
