"""Access control: the service answers requests with an API key or, without keys, those made on its own machine.

    TWINVIEW_API_KEYS        the keys, separated by commas
    TWINVIEW_API_KEYS_FILE   a file with one key per line; empty lines and lines that begin with # are ignored
    TWINVIEW_OPEN=1          without keys, answer everyone who can reach the service

Clients send a key as `Authorization: Bearer KEY`, or as the password of Basic authentication with any user name: a
browser shows a dialog for it. /livez and /readyz need no key.

Without keys a request is answered if it arrived at a loopback address, whatever address the service listens on.
Requests from other machines, or into a container, arrive at other addresses. A website open in a browser on this
machine could point its own name to 127.0.0.1 and so reach the service (DNS rebinding). So the Host header must be an
address, or a name without a dot.
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
HOW_TO_OPEN = "set TWINVIEW_API_KEYS or TWINVIEW_API_KEYS_FILE, or TWINVIEW_OPEN=1 to answer everyone"
INTERNAL = "twinview.internal"  # key in the ASGI scope that marks requests that this process makes to itself


class KeyProblem(ValueError):
    """The configured keys cannot be used. The message names the variable, never a key."""


@dataclass(frozen=True)
class Access:
    digests: tuple[bytes, ...] = ()
    """SHA-256 of each key."""
    open: bool = False
    """Whether everyone is answered if there are no keys."""

    @classmethod
    def from_keys(cls, *keys: str) -> "Access":
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Access":
        """Raises KeyProblem when a file cannot be read, or a variable is set and contains no key."""
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
        return cls(cls.from_keys(*keys).digests, environment.get("TWINVIEW_OPEN", "") == "1")

    def admits(self, key: bytes) -> bool:
        """Returns whether the key is valid. Takes the same time for every wrong key."""
        digest = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0  # compares all of them

    def refusal(self, scope: Scope) -> Refusal | None:
        """Returns why the request is refused; None if it is not."""
        headers = dict(scope["headers"])
        if not self.digests:
            if self.open:
                return None
            address = (scope.get("server") or ("",))[0]
            return _refuse_remote(address, headers.get(b"host", b"").decode("latin-1"))
        key = _key(headers.get(b"authorization", b""))
        if key is None:
            return NoKey("this service requires an API key, as Authorization: Bearer KEY or as the password of Basic")
        return None if self.admits(key) else NoKey("the API key is not one of this service's keys")


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
def _refuse_remote(address: str, host: str) -> Closed | None:
    """Returns why a request to a service without keys is refused; None if it was made on this machine.

    address  the address it arrived at; a path or name for other sockets, which other machines cannot reach
    host     its Host header
    """
    if not _is_loopback(address):
        return Closed(f"this service has no API keys, so it answers requests from its own machine only; {HOW_TO_OPEN}")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    if "." in name and not name.lower().endswith(".localhost") and _address(name) is None:
        return Closed(f"this service has no API keys, so it refuses the host name {name[:100]}; {HOW_TO_OPEN}")
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
    """ASGI middleware: responds 401 or 403 to requests that `access` refuses."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS:
            return await self.app(scope, receive, send)
        refusal = None if INTERNAL in scope else self.access.refusal(scope)
        if refusal is None:
            return await self.app(scope, receive, send)
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
