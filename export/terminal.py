"""What programs print: no traceback when nobody reads it any more, as after `| head`, when the disk is full, or
when its encoding is small."""

import atexit
import contextlib
import io
import os
import sys
from typing import NoReturn

READER_GONE = 141  # what shells report for a program that the system ends for this reason


class _Output(io.TextIOWrapper):
    """Ends the program when its reader has gone, or when nothing can be written any more, as on a full disk."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._end(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> NoReturn:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is still to be written
        if isinstance(error, BrokenPipeError):
            sys.exit(READER_GONE)
        sys.exit(f"error: the output cannot be written ({error.strerror})")


def prepare_output() -> None:
    """Every program calls this once, before it prints. Characters that the encoding lacks are written as escapes. Each
    line is written at once, so that readers see it, and a full disk is noticed while the program can still say so."""
    old = sys.stdout
    if old is not sys.__stdout__ or type(old) is not io.TextIOWrapper:  # already prepared, or replaced by a test
        return
    encoding = old.encoding
    new = _Output(old.detach(), encoding, errors="backslashreplace", line_buffering=True)
    sys.stdout = sys.__stdout__ = new
    atexit.register(_flush)


def _flush() -> None:
    with contextlib.suppress(SystemExit, ValueError):
        sys.stdout.flush()
