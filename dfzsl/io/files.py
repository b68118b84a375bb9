"""Write files atomically, lock them, compute digests, and read text and JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dfzsl.utils.errors import UserError


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` if the block ends well, else it goes.

    A reader therefore sees the old file or the new one, never a part of either, also after a power cut: the
    file is on the disk before it gets its name, and the name before this returns.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with with_filename(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # With the rights that any new file gets here; a writer may put a file with others in its place.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            rights = temporary.stat().st_mode
            yield temporary
            os.chmod(temporary, rights)
            _to_disk(temporary, os.O_RDWR)
            os.replace(temporary, target)
            if os.name == "posix":  # elsewhere a folder cannot be opened
                _to_disk(target.parent, os.O_RDONLY)
        finally:
            temporary.unlink(missing_ok=True)


def _to_disk(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def with_filename(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the system in this block says that it is about `path`: of a full disk it says nothing."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def lock(path: str | os.PathLike[str], wait: bool = False) -> Iterator[bool | None]:
    """Hold `path` against other processes, also of other machines on this disk; yields whether it is held.

    None where the disk knows no locks: nothing is held, and nobody else can be known to hold it. The system
    drops a lock with its process: none is ever stale, and no clock, name or process number decides.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not supports_locks(folder):
        yield None
        return
    held = FileLock(path)
    try:
        held.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


def supports_locks(folder: str | os.PathLike[str]) -> bool:
    """Whether files in `folder` can be locked: some network disks cannot."""
    try:
        import fcntl
    except ImportError:  # Windows locks otherwise
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(path: str | os.PathLike[str], kind: str = "sha256") -> str:
    """The checksum of a file, in hexadecimal. Raises OSError where it cannot be read."""
    made = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file. Raises UserError when it is missing or of another kind."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 ({error})") from None


def read_json(path: str | os.PathLike[str]) -> object:
    """Read a JSON file. Raises UserError when it is missing or broken."""
    try:
        return json.loads(read_text(path))
    # Beside json's own errors: numbers of thousands of digits, and thousands of brackets.
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a JSON file ({error})") from None
