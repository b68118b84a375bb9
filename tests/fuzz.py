"""Plain mutations of one valid file of every kind, for minutes: python tests/fuzz.py --minutes 5.

Every reader gets damaged files in turn, in child processes of bounded time and memory. A file on which a
reader raises anything but its one line, takes too long or dies is kept in --keep, and the exit code is 1:
`python tests/fuzz.py --try KIND FILE` reads it again, with the traceback.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conftest import peak_memory
from readers import EDITS, KINDS, attempt, damaged

ROUND = 200  # files that a child reads
LONGEST = 20.0  # seconds for one of them
MOST = 1 << 31  # bytes by which a child may grow
TOKENS = (
    b"\x00",
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b"..",
    b'"',
)


def edits(draw: random.Random, whole: bytes) -> list[tuple]:
    """One to four edits of `whole`; what comes in is junk, a token that often matters, or a piece of it."""
    made = []
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(whole) + 1)
        junk = draw.choice((draw.randbytes(draw.randint(1, 16)), draw.choice(TOKENS), whole[at : at + 64]))
        made.append((draw.choice(EDITS), draw.random(), draw.randint(1, 64), junk or b"\x00"))
    return made


def child(kind: str, seed: int, place: Path, pipe: Any) -> None:
    """Read ROUND damaged files, each of which is in `place` while it is read; send what went wrong."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path, load = KINDS[kind](Path(folder))
        whole = path.read_bytes()
        attempt(load, path)
        before = peak_memory()
        for _ in range(ROUND):
            data = damaged(whole, edits(draw, whole))
            place.write_bytes(data)
            path.write_bytes(data)
            pipe.send(None)
            try:
                attempt(load, path)
            except BaseException as error:
                pipe.send(f"{type(error).__name__}: {error}"[:200])
                return
            if peak_memory() - before > MOST:
                pipe.send(f"it grew by {(peak_memory() - before) >> 20} MiB")
                return
    pipe.send("")


def watched(kind: str, seed: int, place: Path) -> tuple[int, str]:
    """(files read by a child, what was wrong with the last of them or "")."""
    spawn = multiprocessing.get_context("fork")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=child, args=(kind, seed, place, theirs))
    process.start()
    theirs.close()
    count, said = 0, ""
    try:
        while True:
            # Before the first file, the child makes a whole one of its kind.
            if not ours.poll(LONGEST if count else 10 * LONGEST):
                return count, f"longer than {LONGEST:g} seconds"
            if (said := ours.recv()) is not None:
                return count, said
            count += 1
    except EOFError:
        process.join()
        return count, f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--minutes", type=float, default=1.0)
    flags.add_argument("--seed", type=int, default=int(time.time()))
    flags.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    flags.add_argument("--keep", type=Path, default=Path("fuzzed"), help="folder for files that failed")
    flags.add_argument("--try", dest="again", nargs=2, metavar=("KIND", "FILE"))
    args = flags.parse_args()
    if args.again:
        with tempfile.TemporaryDirectory() as folder:
            path, load = KINDS[args.again[0]](Path(folder))
            shutil.copy(args.again[1], path)
            print(attempt(load, path) or "it was read")
        return
    print(f"seed {args.seed}", flush=True)
    end, number, counts, failed = time.monotonic() + 60 * args.minutes, 0, dict.fromkeys(args.kinds, 0), 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "file"
        while time.monotonic() < end:
            kind = args.kinds[number % len(args.kinds)]
            count, said = watched(kind, args.seed + number, place)
            number += 1
            counts[kind] += count
            if said:
                failed += 1
                args.keep.mkdir(parents=True, exist_ok=True)
                kept = args.keep / f"{kind.replace(' ', '_').replace('/', '_')}-{args.seed + number - 1}"
                shutil.copy(place, kept)
                print(f"{kind}: {said}; kept as {kept}", flush=True)
    print(f"{sum(counts.values()):,} files of {sum(map(bool, counts.values()))} kinds, {failed} failed")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
