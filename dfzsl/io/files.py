"""Write files atomically, lock files, compute digests, and read text and JSON."""

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
    """Yield a temporary path that replaces `path` if the block succeeds, and is deleted otherwise.

    A reader sees the old file or the new one and never a part of either, also after a power failure: file
    and directory are flushed to the disk.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with with_filename(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # The writer may replace the file by one with other permissions: those of a new file are restored.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            mode = temporary.stat().st_mode
            yield temporary
            os.chmod(temporary, mode)
            _flush_to_disk(temporary, os.O_RDWR)
            os.replace(temporary, target)
            if os.name == "posix":  # Windows cannot open a folder
                _flush_to_disk(target.parent, os.O_RDONLY)
        finally:
            temporary.unlink(missing_ok=True)


def _flush_to_disk(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def with_filename(path: str | os.PathLike[str]) -> Iterator[None]:
    """Set the file name of an OSError in this block to `path` if it has none, e.g. that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def lock(path: str | os.PathLike[str], wait: bool = False) -> Iterator[bool | None]:
    """Lock a file against other processes, also those of other machines that share the disk.

    The operating system releases the lock when the process ends, so no lock is ever stale.

    Args:
        path: the lock file.
        wait: wait until the lock is free.

    Yields:
        True if the lock was acquired, False if another process has it, None if the disk has no file locks.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not supports_locks(folder):
        yield None
        return
    file_lock = FileLock(path)
    try:
        file_lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        file_lock.release()


def supports_locks(folder: str | os.PathLike[str]) -> bool:
    """Return whether files in a folder can be locked. Some network disks have no locks."""
    try:
        import fcntl
    except ImportError:  # Windows, which has locks
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write a value as indented JSON, atomically. Raises ValueError for NaN, which is not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(path: str | os.PathLike[str], kind: str = "sha256") -> str:
    """Return the checksum of a file in hexadecimal. Raises OSError if it cannot be read."""
    checksum = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file. Raises UserError if it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file ({error})") from None


def read_json(path: str | os.PathLike[str]) -> object:
    """Read a JSON file. Raises UserError if it is missing or broken."""
    try:
        return json.loads(read_text(path))
    # ValueError also for a number of thousands of digits, RecursionError for thousands of brackets.
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a JSON file ({error})") from None
