"""Read MATLAB files (v5 to v7) from untrusted sources: numbers, text and cells of these, in plain Python.

scipy.io.loadmat reads more kinds of arrays, but a damaged file can make its compiled reader crash the process
or take memory without bound. This reader checks every size against the bytes that follow.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterator

import numpy as np

from dfzsl.io.untrusted.archives import MAX_EXPANSION, MIN_CONTENT

Element = tuple[int, memoryview]  # type and content

MATRIX, COMPRESSED = 14, 15  # types of data elements other than numbers
STORED_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXT_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
CELL, CHAR = 1, 4  # classes of arrays
NUMERIC_CLASSES = dict(enumerate(("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"), start=6))
COMPLEX = 0x800


def read_mat(path: str, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read the numeric, text and cell arrays of a MATLAB file, as scipy.io.loadmat returns them.

    Structures, sparse and complex arrays are skipped.

    Args:
        path: the file.
        names: read only these arrays.

    Returns:
        Arrays by name: numbers in their shape, a row of text as an array of one string, a cell array as an
        object array of such arrays.

    Raises:
        ValueError, OSError, RecursionError, zlib.error: the file is of another kind or broken, or it expands
            to far more than its size.
    """
    with open(path, "rb") as file:
        data = memoryview(file.read())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(data[126:128]))
    if order is None:
        raise ValueError("not of MATLAB's versions 5 to 7")
    arrays = {}
    memory_left = MIN_CONTENT + MAX_EXPANSION * len(data)
    for kind, content in _elements(data[128:], order):
        if kind == COMPRESSED:
            content = _decompress_matrix(content, order, names, memory_left)
        if kind in (MATRIX, COMPRESSED) and content:
            name, array = _read_matrix(content, order, names)
            if array is not None:
                arrays[name] = array
                memory_left -= array.nbytes
    return arrays


def _elements(data: memoryview, order: str) -> Iterator[Element]:
    """Iterate over consecutive data elements."""
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError("truncated")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start, end = at + 8, at + 8 + size
        if kind >> 16:  # a short one: size, type and content in 8 bytes
            size, kind = kind >> 16, kind & 0xFFFF
            start, end = at + 4, at + 4 + size
            if size > 4:
                raise ValueError("a short element is longer than 4 bytes")
        if end > len(data):
            raise ValueError("truncated")
        yield kind, data[start:end]
        at = end if kind == COMPRESSED else at + -(-(end - at) // 8) * 8


def _decompress_matrix(
    content: memoryview, order: str, names: Collection[str] | None, memory_left: int
) -> memoryview:
    """Decompress the matrix in a compressed element; return nothing if its name is not in `names`.

    Raises ValueError if the matrix would take more than `memory_left` bytes of memory.
    """
    head = memoryview(zlib.decompressobj().decompress(content, 4096))
    if len(head) < 8:
        raise ValueError("a variable is truncated")
    kind, size = struct.unpack_from(f"{order}II", head)
    if kind != MATRIX or not size:
        return head[:0]
    flags, shape, name, _ = _read_header(head[8:], order)
    if names is not None and name not in names:
        return head[:0]
    numeric = NUMERIC_CLASSES.get(flags & 0xFF)
    # Numbers may be stored in fewer bytes than in memory. A cell of 8 bytes becomes an object of 128.
    memory = math.prod(shape) * np.dtype(numeric).itemsize if numeric else 16 * size
    if max(size, memory) > memory_left:
        raise ValueError(f"'{name}' expands to more memory than is plausible")
    # Decompressed at once, since joining parts would take twice the memory.
    stream = zlib.decompressobj()
    matrix = stream.decompress(content, 8 + size)
    stream.decompress(stream.unconsumed_tail, 4096)  # verifies the checksum at its end
    if len(matrix) < 8 + size or not stream.eof:
        raise ValueError(f"'{name}' is truncated or followed by other data")
    return memoryview(matrix)[8:]


def _read_header(data: memoryview, order: str) -> tuple[int, tuple[int, ...], str, Iterator[Element]]:
    """Read the header of a matrix.

    Returns:
        Array flags, dimensions, name, and the elements after the header.
    """
    parts = _elements(data, order)
    try:
        (_, flags), (_, dims), (_, name) = next(parts), next(parts), next(parts)
    except StopIteration:
        raise ValueError("a variable without a header") from None
    shape = tuple(int(n) for n in np.frombuffer(dims, f"{order}i4"))
    if len(flags) != 8 or not 2 <= len(shape) <= 32 or min(shape) < 0:
        raise ValueError(f"a variable of dimensions {shape}")
    return struct.unpack_from(f"{order}I", flags)[0], shape, bytes(name).decode("latin-1"), parts


def _read_matrix(
    data: memoryview, order: str, names: Collection[str] | None = None
) -> tuple[str, np.ndarray | None]:
    """Read name and array of a matrix; None if it is of another kind or not in `names`."""
    if not data:  # an empty cell
        return "", np.empty((0, 0))
    flags, shape, name, parts = _read_header(data, order)
    kind = flags & 0xFF
    if (names is not None and name not in names) or flags & COMPLEX:
        return name, None
    if kind == CELL:
        cells = [_read_matrix(content, order)[1] for kind, content in parts if kind == MATRIX]
        if len(cells) != math.prod(shape):
            raise ValueError(f"'{name}' has {len(cells)} cells, not {math.prod(shape)}")
        array = np.empty(len(cells), object)
        array[:] = cells
        return name, array.reshape(shape, order="F")
    if kind == CHAR:
        return name, _read_text(*next(parts, (2, memoryview(b""))), shape, order)
    if kind not in NUMERIC_CLASSES:
        return name, None
    stored, content = next(parts, (2, memoryview(b"")))
    if stored not in STORED_DTYPES:
        raise ValueError(f"'{name}' does not contain numbers")
    numbers = np.frombuffer(content, order + STORED_DTYPES[stored])
    return name, numbers.reshape(shape, order="F").astype(NUMERIC_CLASSES[kind])


def _read_text(stored: int, content: memoryview, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Read a character array, one string per row."""
    if stored not in TEXT_ENCODINGS:
        raise ValueError("a text does not contain characters")
    wide = TEXT_ENCODINGS[stored] in ("utf-16", "utf-32")
    encoding = TEXT_ENCODINGS[stored] + {"<": "-le", ">": "-be"}[order] * wide
    characters = np.frombuffer(bytes(content).decode(encoding).encode("utf-32-le"), "<U1")
    if len(shape) != 2 or math.prod(shape) != len(characters):
        raise ValueError(f"a text of {len(characters)} characters, not {shape}")
    if not len(characters):
        return np.array([], "<U1")
    return np.array(["".join(row) for row in characters.reshape(shape, order="F")])
