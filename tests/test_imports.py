"""dfzsl/imports.py: torchvision and open_clip without the compiler and timm, which are there once used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import dfzsl.imports as imports

LATE = """
seen = []
class Base:
    def hello(self): return "hello"
class Other: pass
def double(x): return 2 * x
def made(): return Base()
table = {"a": 1}
"""

# What a package may do with a late one: (its source, whether it can be imported without it)
USES = {
    "calls a function later": ("from late.inner import double\ndef answer(): return double(21)", True),
    "takes the module": ("import late\ndef answer(): return late.inner.double(21)", True),
    "takes the inner module": ("import late.inner as it\ndef answer(): return it.double(21)", True),
    "takes it from its package": ("from late import inner\ndef answer(): return inner.double(21)", True),
    "asks a class": (
        "from late.inner import Base, made\n"
        "def answer(): return isinstance(made(), Base), isinstance(1, Base)",
        True,
    ),
    "asks for a subclass": ("from late.inner import Base\ndef answer(): return issubclass(int, Base)", True),
    "names a class in a type": (
        "from typing import Optional\nfrom late.inner import Base\nX = Optional[Base]\n"
        "def answer(): return Base().hello()",
        False,
    ),
    "reads a table later": ("from late.inner import table\ndef answer(): return table.get('a')", True),
    "calls at once": ("from late.inner import double\nx = double(21)\ndef answer(): return x", False),
    "derives": (
        "from late.inner import Base\nclass Mine(Base): pass\n"
        "def answer(): return Mine().hello(), Mine.__mro__[1].__module__",
        False,
    ),
    "takes all": ("from late.inner import *\ndef answer(): return double(21)", False),
    "looks for another name": (
        "try:\n    from late.inner import old_name as f\n"
        "except ImportError:\n    from late.inner import double as f\n"
        "def answer(): return f(21)",
        False,
    ),
    "looks for another module": (
        "try:\n    from late.old import double\nexcept ImportError:\n    from late.inner import double\n"
        "def answer(): return double(21)",
        True,
    ),
    "catches everything": (
        "try:\n    from late.inner import old_name as f\nexcept Exception:\n    f = None\n"
        "def answer(): return f is None",
        False,
    ),
    "compares versions": ("import late\nnew = late.__version__ > '1'\ndef answer(): return new", False),
    "adds to a table": ("from late.inner import table\nx = table | {}\ndef answer(): return x", False),
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Writes a package `early` of one source beside `late` and `late.inner`; none of them stays imported."""

    def write(source: str) -> None:
        for name, text in (
            ("early/__init__", "from . import part\nfrom .part import answer"),
            ("early/part", source),
            ("late/__init__", "__version__ = '2'\nfrom . import inner"),
            ("late/inner", LATE),
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / f"{name}.py").write_text(text + "\n")
        importlib.invalidate_caches()

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in ("early", "late")]:
            del sys.modules[name]

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(imports, "LATER", ("late",))
    write.forget = forget
    yield write
    forget()


@pytest.mark.parametrize(("source", "can_wait"), USES.values(), ids=USES)
def test_a_package_does_the_same_with_a_late_one(packages, source, can_wait):
    packages(source)
    expected = importlib.import_module("early").answer()
    packages.forget()
    finders = list(sys.meta_path)
    early = imports.import_lean("early")
    assert ("late" in sys.modules) != can_wait and sys.meta_path == finders
    assert early.answer() == expected and early is sys.modules["early"]
    if not can_wait or "inner" in source:
        real = importlib.import_module("late.inner")
        assert real.__file__.endswith("inner.py") and type(real) is type(sys)
        assert early.answer() == expected


def test_a_package_without_the_late_one_learns_that(packages, tmp_path):
    packages("try:\n    import later\nexcept ImportError:\n    later = None\ndef answer(): return later")
    assert imports.import_lean("early").answer() is None


def test_a_broken_package_says_so(packages):
    packages("from late.inner import double\n1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            imports.import_lean("early")
        assert "early.part" not in sys.modules


PROGRAM = """
import sys
from dfzsl.trainers.clip.loading import load_backbone
late = lambda: [name for name in ("timm", "torch._dynamo", "sympy") if name in sys.modules]
backbone = load_backbone("shapes")
import torch
backbone.encode_image(torch.zeros(1, 3, *backbone.preprocess_cfg["size"]))
backbone.encode_text(["a red ring"])
load_backbone("RN50", "random")
assert not late(), late()
import open_clip
for pool in ("avg", "rot_attn", "abs_attn"):
    tower = open_clip.timm_model.TimmModel("resnet18", 8, image_size=32, pool=pool, proj="linear")
    assert tower.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 8)
import timm
assert isinstance(tower.trunk, timm.models.ResNet) and timm.layers.Mlp(2)
roi_align = sys.modules["torchvision.ops.roi_align"]
from torch._dynamo.utils import is_compile_supported
assert roi_align.is_compile_supported("cpu") == is_compile_supported("cpu")
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""


def test_pictures_and_texts_need_neither_and_both_are_there():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
