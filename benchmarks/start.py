"""How long commands take before they show something: python benchmarks/start.py [--rounds 3]

Of a process of its own, the least of the rounds, in turn: processor seconds, and seconds by the clock until
it has said its first line; beside them what `import torch` and `import torch, open_clip` take. The finished
sweep is of two methods on a small folder of pictures: all that is left to do is to show their table, and to
see that its runs are those that were asked for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from extract import pictures
from tabulate import tabulate

from dfzsl.trainers.clip.loading import load_backbone
from dfzsl.trainers.generation.classifier import Classifier

# As always, but for the guard: beside a CPU-only torch the registry's torchvision cannot be imported without.
BOTH = "import dfzsl.utils.torchvision_import as i; i.import_torchvision(); import open_clip"
FLOOR = "import torch, open_clip"
SWEEP = (
    "dfzsl.launch base2new --methods ZeroshotCLIP,TeacherZeroshot folder:kinds 1 MODEL.BACKBONE.NAME shapes"
)
COMMANDS = {
    "import torch": ["-c", "import torch"],
    FLOOR: ["-c", BOTH],
    "dfzsl --help": ["-m", "dfzsl.cli.main", "--help"],
    "dfzsl predict, one picture": ["-m", "dfzsl.cli.main", "predict", "000000.jpg"],
    "a finished sweep": ["-m", *SWEEP.split()],
}


def seconds(words: list[str], folder: Path) -> tuple[float, float]:
    """Of `python WORDS` in a folder: processor seconds, with those of the processes that it starts, and
    seconds until it says something, or ends."""
    before, started = os.times(), time.perf_counter()
    environment = {**os.environ, "DFZSL_CACHE": str(folder / "cache")}
    command = [sys.executable, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True) as ran:
        assert ran.stdout
        ran.stdout.readline()
        first = time.perf_counter() - started
        told = ran.communicate()[1]
    if ran.returncode:
        raise SystemExit(told)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4]), first  # of children: user, system


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=3)
    args = flags.parse_args()
    backbone = load_backbone("shapes")
    rows, zeros = F.normalize(torch.randn(100, backbone.dim), dim=1), torch.zeros(100)
    names = [f"class {c}" for c in range(100)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, picture in enumerate(pictures(folder, 41, 64)[1:]):
            kind = folder / "kinds" / "abcd"[number % 4]
            kind.mkdir(parents=True, exist_ok=True)
            shutil.move(picture.impath, kind)
        Classifier(
            rows, names, zeros.bool(), zeros, backbone=backbone.name, weights=backbone.weights_id
        ).save(folder / "classifier.safetensors")
        seconds(COMMANDS["a finished sweep"], folder)  # which finishes it
        took = [[seconds(words, folder) for words in COMMANDS.values()] for _ in range(args.rounds)]
    least = {
        name: [min(values) for values in zip(*rounds, strict=True)]
        for name, rounds in zip(COMMANDS, zip(*took, strict=True), strict=True)
    }
    table = [(name, cpu, cpu / least[FLOOR][0], first) for name, (cpu, first) in least.items()]
    headers = ("command", "CPU seconds", "of the import", "seconds to its first line")
    print(tabulate(table, headers=headers, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
