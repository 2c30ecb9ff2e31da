"""Reads the images in a request's body: a form, one image file, or a pack.

    multipart/form-data                  any number of files in the field `images`
    image/*, application/octet-stream    one image file
    application/x-twinview-pack          many image files, in the format of serving/protocol/pack.py

Other media types are refused. The image's real format is found when it is decoded.
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
    """Returns the request's Content-Type without parameters; empty if it has none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_images(request: Request, most: int) -> list[Upload]:
    """Returns 1 to `most` uploads, named images[i]. Raises UnsupportedType, Malformed, TooLarge."""
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
            f"images are sent as {FORM}, image/*, {BYTES} or {pack.MEDIA_TYPE}, not as {kind[:100]}; /v1/embeddings "
            "accepts base64 in JSON"
        )
    if not images:
        raise Malformed("images: the request has none", "images")
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
    return TooLarge(f"more than {most} images in one request; send fewer at a time", "images")


async def _read_form(request: Request, most: int) -> list[Upload]:
    try:
        form = await request.form(max_files=most)
    except HTTPException as error:
        if error.detail.startswith("Too many files"):
            raise _too_many(most) from error
        raise Malformed(error.detail) from error
    try:
        files = form.getlist("images")
        if not files:
            raise Malformed("images: the form has no such field", "images")
        return [await read_file(f"images[{i}]", file) for i, file in enumerate(files)]
    finally:
        await form.close()


async def read_file(field: str, file: UploadFile | str) -> Upload:
    """Raises Malformed when the form's field is text."""
    if isinstance(file, str):
        raise Malformed(f"{field}: must be a file", field)
    return Upload(field, file.filename or "", await file.read())
