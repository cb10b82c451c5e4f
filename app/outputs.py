"""What a command says when it cannot go on, and where it writes what it finds: tried before anything is measured, and
named by its option where it fails.
"""

import argparse
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile


class CannotWrite(Exception):
    """Names the option, and says why not."""


def failed(error: BaseException, exit_code: int) -> int:
    """The exit code, when the error has been told in a line."""
    sys.stderr.write(f"sluice: {error}\n")
    return exit_code


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """An OSError of the block becomes a CannotWrite."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{option} {path} cannot be written: {error.strerror or error}") from error


def make_directory(option: str, path: Path) -> None:
    """With its parents, unless it is there. Raises CannotWrite, also where no file can be made in it."""
    with writing(option, path):
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()


def try_file(option: str, path: Path) -> None:
    """Leaves everything as it was. Raises CannotWrite."""
    with writing(option, path):
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()


def asked(options: argparse.Namespace, secret: Collection[str] = ()) -> dict[str, str]:
    """What a command was told, for the first line of its rows; 0 is something, an option left out is not."""
    told = vars(options).items()
    return {
        name: str(value)
        for name, value in told
        if name not in secret and value not in (None, []) and value is not False
    }
