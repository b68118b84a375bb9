"""Feeds the unpickler of checkpoints with programs made at random: python fuzz_pickle.py --seconds 60.

Half are streams of operations that a stack machine could run, half damaged pickles of whole checkpoints. Each
must be read or refused with UnpicklingError, in a process of at most 1 GiB more than it began with.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import pickle
import random
import resource
import tempfile
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import torch
from dassl.utils import load_checkpoint

NAMES = [
    "builtins dict",
    "builtins set",
    "builtins list",
    "collections OrderedDict",
    "collections defaultdict",
    "collections Counter",
    "_codecs encode",
    "numpy dtype",
    "numpy.core.multiarray scalar",
    "torch FloatStorage",
    "torch.storage UntypedStorage",
    "torch float32",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch.optim.sgd SGD",
    "os system",
]
TEXTS = [
    "",
    "a",
    "latin1",
    "hex",
    "f8",
    "O8",
    "storage",
    "0",
    "cpu",
    "_metadata",
    "takes",
    "__class__",
    "x" * 5000,
]
# (operation, what it takes from the stack, what it leaves there)
RULES: list[tuple[bytes, list[str], str]] = [
    *((op, [], kind) for op, kind in ((b"N", "any"), (b")", "tuple"), (b"]", "list"), (b"}", "dict"))),
    *(
        (op, [], kind)
        for op, kind in ((b"\x8f", "set"), (b"K\x01", "any"), (b"\x8a\x09" + b"\x7f" * 9, "any"))
    ),
    *(
        (pickle.TUPLE1, ["any"], "tuple"),
        (pickle.TUPLE2, ["any"] * 2, "tuple"),
        (pickle.TUPLE3, ["any"] * 3, "tuple"),
    ),
    *((pickle.APPEND, ["list", "any"], "list"), (pickle.SETITEM, ["dict", "any", "any"], "dict")),
    *((pickle.REDUCE, ["name", "tuple"], "any"), (pickle.NEWOBJ, ["name", "tuple"], "any")),
    *(
        (pickle.BUILD, ["any", "dict"], "any"),
        (pickle.BINPERSID, ["tuple"], "any"),
        (pickle.POP, ["any"], ""),
    ),
    *((pickle.MARK + op, ["list"], "list") for op in (pickle.APPENDS, pickle.ADDITEMS, pickle.SETITEMS)),
]


def program(draw: random.Random) -> bytes:
    """A stream of operations that mostly fit; often a few again and again, which is how bombs are made."""
    stack: list[str] = []
    memo: list[str] = []
    parts: list[bytes] = []

    def fits(needs: list[str]) -> bool:
        top = stack[len(stack) - len(needs) :]
        return len(top) == len(needs) and all(a in ("any", b) for a, b in zip(needs, top, strict=True))

    for _ in range(draw.randrange(1, 80)):
        kind = draw.random()
        if kind < 0.15:
            parts.append(pickle.GLOBAL + draw.choice(NAMES).replace(" ", "\n").encode() + b"\n")
            stack.append("name")
        elif kind < 0.25:
            text = draw.choice(TEXTS).encode()
            parts.append(
                draw.choice([pickle.BINUNICODE, pickle.BINBYTES]) + len(text).to_bytes(4, "little") + text
            )
            stack.append("text")
        elif kind < 0.35 and stack and len(memo) < 256:
            parts.append(pickle.MEMOIZE)
            memo.append(stack[-1])
        elif kind < 0.45 and memo:
            place = draw.randrange(len(memo))
            parts.append(pickle.BINGET + bytes([place]))
            stack.append(memo[place])
        elif kind < 0.46:
            parts.append(draw.randbytes(1))
        else:
            op, needs, left = draw.choice([rule for rule in RULES if fits(rule[1])])
            parts.append(op)
            del stack[len(stack) - len(needs) :]
            stack += [left] * bool(left)
    if draw.random() < 0.5:
        start = draw.randrange(len(parts))
        parts[start:start] = parts[start : start + draw.randrange(1, 4)] * draw.choice([5, 50, 5000])
    return b"\x80\x02" + b"".join(parts) + b"."


def pickles(folder: Path) -> list[bytes]:
    """Of whole checkpoints."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": layer.state_dict(),
        "optimizer": optimizer,
        "state": defaultdict(dict, {layer.weight: {"a": (1, (2.0, "b"))}}),
        "milestones": Counter([1, 2, 2]),
        "rest": [
            OrderedDict(a=1),
            {1, 2},
            torch.Size([2, 3]),
            torch.device("cpu"),
            torch.float16,
            b"abc",
            None,
        ],
    }
    found = []
    for protocol in (2, 4):
        torch.save(content, folder / "whole", pickle_protocol=protocol)
        with zipfile.ZipFile(folder / "whole") as archive:
            found.append(archive.read("whole/data.pkl"))
    return found


def damaged(draw: random.Random, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(draw.randrange(1, 4)):
        place, size = draw.randrange(len(data)), draw.randrange(1, 30)
        if draw.random() < 0.5:
            data[place : place + draw.choice([0, 1])] = draw.choice(RULES)[0]
        elif draw.random() < 0.5:
            data[place:place] = data[place : place + size] * draw.choice([1, 2, 1000])
        else:
            data[place] = draw.randrange(256)
    return bytes(data)


def archive_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {
            "data.pkl": data,
            "byteorder": b"little",
            "data/0": bytes(16),
            "data/1": bytes(8),
        }.items():
            archive.writestr(f"a/{name}", content)
    return buffer.getvalue()


def fuzz(seed: int, seconds: float, most: int | None = None) -> tuple[int, int, float, bytes]:
    """(programs tried, those that were read, the longest time, the program that took it)."""
    draw, end, read, worst = random.Random(seed), time.monotonic() + seconds, 0, (0.0, b"")
    with tempfile.TemporaryDirectory() as folder:
        whole, path = pickles(Path(folder)), Path(folder) / "c"
        for tried in itertools.count():
            if tried == most or time.monotonic() > end:
                return tried, read, *worst
            data = program(draw) if draw.random() < 0.5 else damaged(draw, draw.choice(whole))
            path.write_bytes(archive_of(data))
            start = time.monotonic()
            try:
                value = load_checkpoint(str(path))
            except pickle.UnpicklingError:
                pass
            else:
                # Whoever has it may look at it.
                read += 1
                copy.deepcopy(value)
                repr(value)
            worst = max(worst, (time.monotonic() - start, data))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seconds", type=float, default=60)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--most", type=int, help="programs to try at most")
    given = flags.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(given.seconds) + 60, resource.RLIM_INFINITY))
    tried, read, longest, data = fuzz(given.seed, given.seconds, given.most)
    print(
        f"{tried:,} programs: {read:,} read, the others refused; {longest:.2f} s at most, for {data[:80]!r}"
    )


if __name__ == "__main__":
    main()
