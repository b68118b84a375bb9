#!/usr/bin/env bash
# From an empty folder to a classifier, on the built-in world: bash docs/end_to_end.sh FOLDER
set -euo pipefail
mkdir -p "${1:?name a folder}" && cd "$1"

# The world: the owner's pictures and others to try the classifier on, a folder for each class, and the names.
python - <<'PYTHON'
from pathlib import Path

from dfzsl.datasets.shapes import rows, write_part

for part in ("train", "test"):
    write_part(Path("world"), part)
    names = {Path(row.path).parent.name: row.classname for row in rows("world", part)}
    Path("world", part, "classnames.txt").write_text("".join(f"{key} {name}\n" for key, name in names.items()))
every = list(names.values())
Path("base.txt").write_text("\n".join(every[:60]))
Path("new.txt").write_text("\n".join(every[60:-1]))
Path("one.txt").write_text(every[-1])
PYTHON

# The owner fits a teacher on pictures of the base classes.
dfzsl teacher fit world/train --classes base.txt --backbone shapes
dfzsl show teacher.safetensors

# The owner keeps the teacher, and answers with labels alone, to whom has a token.
DFZSL_TEACHER_TOKEN=$(dfzsl teacher token teacher.safetensors client)
export DFZSL_TEACHER_TOKEN
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
dfzsl teacher serve teacher.safetensors --access labels --budget 200000 --port "$port" --log access.log &
trap "kill $! 2>/dev/null" EXIT
until python -c "import socket; socket.create_connection(('127.0.0.1', $port))" 2>/dev/null; do sleep 1; done

# The client asks it, and builds one classifier for base and new classes without a picture.
dfzsl build --teacher "http://127.0.0.1:$port" --access labels --backbone shapes --new new.txt
dfzsl add classifier.safetensors --new one.txt

# What the classifier does.
dfzsl predict world/test/119* --top 3
dfzsl evaluate world/test --confusion confusion.png
dfzsl export classifier.safetensors --with-encoder
