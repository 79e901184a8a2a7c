"""Lines that a command writes to a file or to standard output."""

from __future__ import annotations

import gzip
import os
import sys
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def writing(out: Path | None) -> Iterator[Callable[[bytes], object]]:
    """Standard output, or a file that is there whole or not at all, compressed when its name ends in .gz.

    What is there and no file, such as a pipe, is written as it comes. Raises `BadRequest` when it can't be written.
    """
    if out is None:
        yield sys.stdout.buffer.write
        sys.stdout.flush()
        return
    plain = not out.exists() or out.is_file()
    # Its own name as long as it is not whole: two commands that write one file don't mix.
    target = out.with_name(f"{out.name}.{os.getpid()}.unfinished") if plain else out
    try:
        with _open(target, packed=out.suffix == ".gz") as file:
            yield file.write
        if plain:
            target.replace(out)
    except OSError as error:
        raise BadRequest(f"{out} can't be written: {error.strerror or error}") from None
    finally:
        if plain:
            with suppress(OSError):
                target.unlink(missing_ok=True)


def _open(target: Path, *, packed: bool) -> IO[bytes]:
    return gzip.open(target, "wb") if packed else target.open("wb")  # type: ignore[return-value]
