"""From a request's body to files: a form, one image as it is, or a pack.

    multipart/form-data                  any number of files in the field `images`
    image/*, application/octet-stream    one image
    application/x-twinview-pack          many; pack.py has the format

What is announced as none of these is refused; what an image really is shows when it is decoded.
"""

from itertools import islice

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from serving.errors import Malformed, TooLarge, UnsupportedType
from serving.inference.decode import Upload
from serving.protocol import pack

FORM = "multipart/form-data"
BYTES = "application/octet-stream"


def media_type(request: Request) -> str:
    """As the request announces it, without parameters; empty where it does not."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_images(request: Request, most: int) -> list[Upload]:
    """1 to `most` files, named images[i]. raises UnsupportedType, Malformed, TooLarge."""
    kind = media_type(request)
    if kind == FORM:
        return await _read_form(request, most)
    if kind == pack.MEDIA_TYPE:
        images = _unpack(await request.body(), most)
    elif kind in ("", BYTES) or kind.startswith("image/"):
        body = await request.body()
        images = [body] if body else []
    else:
        raise UnsupportedType(
            f"images come as {FORM}, image/*, {BYTES} or {pack.MEDIA_TYPE}, not as {kind[:100]}; base64 in JSON is "
            "taken at /v1/embeddings"
        )
    if not images:
        raise Malformed("images: there is none in the request", "images")
    return [Upload(f"images[{i}]", "", image) for i, image in enumerate(images)]


def _unpack(body: bytes, most: int) -> list[bytes]:
    try:
        images = list(islice(pack.unpack(body), most + 1))
    except pack.BrokenPack as error:
        raise Malformed(str(error), error.image) from error
    if len(images) > most:
        raise _too_many(most)
    return images


def _too_many(most: int) -> TooLarge:
    return TooLarge(f"more than {most} images in one request; no more are taken", "images")


async def _read_form(request: Request, most: int) -> list[Upload]:
    try:
        form = await request.form(max_files=most)
    except HTTPException as error:
        if error.detail.startswith("Too many files"):
            raise _too_many(most) from error
        raise Malformed(error.detail) from error
    try:
        uploads = form.getlist("images")
        if not uploads:
            raise Malformed("images: there is none in the form", "images")
        return [await read_file(f"images[{i}]", upload) for i, upload in enumerate(uploads)]
    finally:
        await form.close()


async def read_file(field: str, upload: UploadFile | str) -> Upload:
    if isinstance(upload, str):
        raise Malformed(f"{field}: must be a file", field)
    return Upload(field, upload.filename or "", await upload.read())
