"""Reads the images in a request's body: a form, one image file, or a pack.

    multipart/form-data                  any number of files in the field `images`
    image/*, application/octet-stream    one image file
    application/x-twinview-pack          many image files, in the format of serving/protocol/pack.py

Other media types are refused. The image's real format is found when it is decoded.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from export.suggest import did_you_mean
from serving.errors import Malformed, TooLarge, UnsupportedType
from serving.inference.decode import Upload
from serving.protocol import pack

FORM = "multipart/form-data"
BYTES = "application/octet-stream"


def media_type(request: Request) -> str:
    """Returns the request's Content-Type without parameters; empty if it has none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_images(request: Request, most: int, fields: Sequence[str] = ()) -> list[Upload]:
    """Returns 1 to `most` uploads, named images[i]. Raises UnsupportedType, Malformed, TooLarge.

    fields  what a form may have besides
    """
    kind = media_type(request)
    if kind == FORM:
        return await read_form(request, most, "images", fields)
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
        raise _too_many(most, "images")
    return images


def _too_many(most: int, field: str) -> TooLarge:
    return TooLarge(f"more than {most} images in one request; send fewer at a time", field)


async def read_form(request: Request, most: int, field: str, others: Sequence[str] = ()) -> list[Upload]:
    """Returns 1 to `most` uploads, named field[i]. Raises Malformed, TooLarge.

    field   the form's field with the files
    others  what the form may have besides
    """
    try:
        form = await request.form(max_files=most)
    except HTTPException as error:
        if error.detail.startswith("Too many files"):
            raise _too_many(most, field) from error
        raise
    try:
        known = (field, *others)
        for name in form:
            if name not in known:
                near = did_you_mean(name, known) or f", which has {' and '.join(known)}; parameters go into the address"
                raise Malformed(f"{name}: is not a field of this form{near}", name)
        refuse_twice(name for name, _ in form.multi_items() if name != field)
        files = form.getlist(field)
        if not files:
            raise Malformed(f"{field}: the form has no such field", field)
        return [await read_file(f"{field}[{i}]", file) for i, file in enumerate(files)]
    finally:
        await form.close()


def refuse_twice(names: Iterable[str]) -> None:
    """Raises Malformed for a name that is there twice."""
    for name, count in Counter(names).items():
        if count > 1:
            raise Malformed(f"{name}: is there twice", name)


async def read_file(field: str, file: UploadFile | str) -> Upload:
    """Raises Malformed when the form's field is text."""
    if isinstance(file, str):
        raise Malformed(f"{field}: must be a file", field)
    return Upload(field, file.filename or "", await file.read())
