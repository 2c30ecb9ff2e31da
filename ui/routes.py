"""The routes of Gradio that the page and gradio_client need; all others answer 404.

Gradio also offers, for instance, to fetch any address that a visitor names, and statistics of the visitors.
"""

import errno
import re
from pathlib import Path

import gradio as gr
from gradio.route_utils import GradioMultiPartParser
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OURS = tuple(str(Path(__file__).parents[1] / package) + "/" for package in ("ui", "serving"))
NEEDED = re.compile(
    r"""(?x)
    /? | /config/? | /theme\.css
    | /(assets|static)/.{1,200}
    | /gradio_api/(info|startup-events|upload|upload_progress|component_server|queue/join|queue/data|cancel|reset)/?
    | /gradio_api/heartbeat/\w{1,64}
    | /gradio_api/file=/.{1,4000}                      # a file that was uploaded, or made to be downloaded
    | /gradio_api/call/(?P<function>\w+)(/\w{1,64})?
    """
)

MANIFEST = b'<link rel="manifest" href="/manifest.json" />'  # of a site as a whole; the page has none


class NeededRoutes:
    """ASGI app: the page, without the routes that it does not need, and without a link to a file outside of it."""

    def __init__(self, app: ASGIApp, page: gr.Blocks):
        self.app = app
        self.functions = {one.api_name for one in page.fns.values() if one.api_visibility == "public"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        match = NEEDED.fullmatch(scope["path"].removeprefix(scope.get("root_path", "")))
        known = match and (match["function"] is None or match["function"] in self.functions)
        if scope["type"] != "http" or not known:
            return await _refuse(scope, receive, send)
        held: list[Message] = []

        async def send_unless_failed(message: Message) -> None:
            if held or (message["type"] == "http.response.start" and message["status"] == 500):
                held.append(message)
            else:
                if MANIFEST in message.get("body", b""):
                    message["body"] = message["body"].replace(MANIFEST, b" " * len(MANIFEST))
                await send(message)

        try:
            await self.app(scope, receive, send_unless_failed)
        except Exception as error:
            if not held or _is_ours(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # the service knows what to answer
            answer = PlainTextResponse("the page does not understand this request", status_code=400)
            return await answer(scope, receive, send)
        for message in held:
            await send(message)


class Uploads(GradioMultiPartParser):
    """Reads uploads as Gradio does, and leaves no files of those that end in their middle, or that it would refuse."""

    async def parse(self) -> FormData:
        try:
            form = await super().parse()
            if any(name != "files" or isinstance(value, str) for name, value in form.multi_items()):
                raise MultiPartException("an upload consists of files only, in the field files")
            return form
        except BaseException:
            for file in self._files_to_close_on_error:
                file.close()
                Path(file.name).unlink(missing_ok=True)
            raise


def _is_ours(error: Exception) -> bool:
    """Whether code of this project was running. If not, Gradio has failed to read the request."""
    trace = error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(OURS) and file != __file__:
            return True
        trace = trace.tb_next
    return False


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    await PlainTextResponse("this page offers nothing here", status_code=404)(scope, receive, send)
