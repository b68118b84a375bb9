"""Files written whole or not at all, and read without trusting who wrote them."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import secrets
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dfzsl.utils.errors import UNPRINTABLE, UserError

ROOM, EXPANSION = 1 << 30, 100  # memory that reading a file may take: bytes, and times its size
YAML_LONGEST, YAML_TEXT, YAML_NUMBER, YAML_DEEPEST = 1 << 18, 4096, 40, 20  # characters of each, and levels


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` if the block ends well, else it goes.

    A reader therefore sees the old file or the new one, never a part of either, also after a power cut: the
    file is on the disk before it gets its name, and the name before this returns.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with naming(target):
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
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
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
    if not knows_locks(folder):
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


def knows_locks(folder: str | os.PathLike[str]) -> bool:
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


@contextlib.contextmanager
def bounded(path: str | os.PathLike[str]) -> Iterator[None]:
    """Refuse a small file that grows into huge data: a block that reads `path` may take memory of 100 times
    its size and 1 GiB, where the system can say (Linux). Raises UserError beyond."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        size = os.stat(path).st_size
    except (ImportError, OSError):
        yield
        return
    was = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + ROOM + EXPANSION * size
    if was[0] != resource.RLIM_INFINITY:
        most = min(most, was[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, was[1]))
    try:
        yield
    except MemoryError:
        raise UserError(
            f"{path}: it claims far more data than its {size:,} bytes hold, or memory is short"
        ) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, was)


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


class _Yaml(yaml.SafeLoader):
    """YAML of plain values. Aliases can make a billion values of ten lines; a long number takes minutes."""

    LONGEST = {  # noqa: RUF012
        **{f"tag:yaml.org,2002:{name}": YAML_NUMBER for name in ("null", "bool", "int", "float")},
        **{f"tag:yaml.org,2002:{name}": YAML_TEXT for name in ("str", "seq", "map")},
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        start = self.peek_event()
        self._refuse(isinstance(start, yaml.AliasEvent), start, "an alias (*name); write the value out")
        self._refuse(self.depth > YAML_DEEPEST, start, f"more than {YAML_DEEPEST} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None:
            tag, longest = node.tag.replace("tag:yaml.org,2002:", "!!"), self.LONGEST.get(node.tag)
            self._refuse(
                longest is None, node, f"the tag {tag}; only numbers, texts, lists and keys are read"
            )
            long = longest is not None and isinstance(node, yaml.ScalarNode) and len(node.value) > longest
            self._refuse(long, node, f"a value ({tag}) of more than {longest} characters")
        return node

    def _refuse(self, wrong: bool, at: yaml.Event | yaml.Node, what: str) -> None:
        if wrong:
            raise yaml.MarkedYAMLError(problem=f"it has {what}", problem_mark=at.start_mark)


@functools.lru_cache
def _plain(text: str) -> object:
    """A sweep reads the same configs for each of its runs."""
    return _Yaml(text).get_single_data()


def read_yaml(path: str | os.PathLike[str]) -> object:
    """Read a YAML file of plain values, none of them long. Raises UserError when it is missing or wrong."""
    text = read_text(path)
    if len(text) > YAML_LONGEST:
        raise UserError(f"{path}: {len(text):,} characters; a YAML file here has at most {YAML_LONGEST:,}")
    try:
        return copy.deepcopy(_plain(text))
    # Beside yaml's own errors: values that are none of the type that their tag claims.
    except (yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or error
        where = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{path}: not plain YAML: {said}{where}") from None


def checked_names(names: object, where: object, taken: Iterable[str] = ()) -> list[str]:
    """`names` if it is a list of class names, none of them one of `taken`: the one rule for all that come in.

    Raises UserError, naming `where`, for a name that is empty, that has control characters (logs, tables and
    terminals would obey them), or that stands for two classes (`spoken`).
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: it has no list of class names")
    base = {spoken(name): name for name in taken}
    seen = dict(base)
    for label, name in enumerate(names):
        if UNPRINTABLE.search(name):
            raise UserError(
                f"{where}: the name of class {label} has characters that cannot be shown: '{name}'"
            )
        if not (said := spoken(name)):
            raise UserError(f"{where}: class {label} has no name")
        if said in seen:
            how = "is a base class already" if said in base else "is the name of two classes"
            other = "" if seen[said] == name else f" (also written '{seen[said]}')"
            raise UserError(f"{where}: '{name}' {how}{other}; a class needs a name of its own")
        seen[said] = name
    return list(names)


def spoken(name: str) -> str:
    """What a text encoder reads of a class name: _ is a space, and case, blanks in a row and the Unicode form
    of a letter are nothing. Names that are spoken alike are one."""
    return " ".join(unicodedata.normalize("NFC", name.replace("_", " ").casefold()).split())
