# Sourced by every script: changes to the project's root and puts a complete Python environment first on PATH.
# The active environment is used if it is complete; otherwise .venv is created on first use.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

complete() {
    "$1" - <<'PYTHON' 2>/dev/null
import importlib.util as util
import os
needed = "torch torchvision open_clip dassl yacs tabulate matplotlib click onnx onnxruntime onnxscript scipy"
needed += " anyio fastapi fastapi_offline filelock httpx pydantic safetensors submitit tensorboard tqdm uvicorn"
tools = "pytest xdist hypothesis ruff mypy importlinter codespell_lib nbclient ipykernel sklearn skops"
for name in f"{needed} {tools}".split():
    assert util.find_spec(name), name
# An installation from another checkout would run that checkout's code.
assert os.path.samefile(util.find_spec("dfzsl.trainers").origin, "trainers/__init__.py")
assert util.find_spec("dfzsl.safe_pickle")
PYTHON
}

if ! complete python; then
    if ! complete .venv/bin/python; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "error: python3 must be Python 3.10 or newer" >&2; exit 2; }
        echo "Creating .venv; this takes a minute or two" >&2
        python3 -m venv .venv ||
            { echo "error: python3 cannot create a virtual environment; install python3-venv" >&2; exit 2; }
        # uv does the same as pip but faster.
        install=(.venv/bin/python -m pip install --quiet)
        if command -v uv >/dev/null; then install=(uv pip install --quiet --python .venv/bin/python); fi
        "${install[@]}" --constraint constraints.txt torch torchvision open_clip_torch
        .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("dassl"))' ||
            "${install[@]}" --editable compat/dassl
        "${install[@]}" --constraint constraints.txt --editable '.[test]'
        complete .venv/bin/python || { echo "error: the installation into .venv is incomplete; see above" >&2; exit 2; }
    fi
    export PATH="$PWD/.venv/bin:$PATH"
fi
