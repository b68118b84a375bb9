"""How torchvision and open_clip are imported: where they would fail, and without what they hardly ever use.

torchvision names a function of torch's compiler, and open_clip some of timm. Those two take longer to import
than torchvision and open_clip do, and few programs come to use them: here they are imported when they are.

The registry's Linux wheel of torchvision is a CUDA build. Beside a CPU-only torch its operators stay
unregistered, and importing it fails on two unguarded `register_fake` calls, for operators that nothing
here uses. Declaring the two schemas lets the import pass.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LATER = ("torch._dynamo", "timm")  # nothing that is caught by `except`: no stand-in can be
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Of a program: no search for garbage while it imports, nor later among what it has imported.

    torch makes some hundred thousand objects that stay; searching them takes a tenth of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@functools.cache
def import_torchvision() -> tuple[ModuleType, torch.library.Library | None]:
    """Import torchvision, once, and return the module (and the library handle that must stay alive).

    Call it before anything that imports torchvision (open_clip does). Every error but the missing
    `torchvision::nms` passes through.
    """
    try:
        return import_lean("torchvision"), None
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return import_lean("torchvision"), library


def import_lean(package: str) -> ModuleType:
    """Import a package with LATER put off; if it cannot be imported so, as it always is."""
    if package not in sys.modules:
        with contextlib.suppress(Exception), _Later() as later:  # an error that is not ours comes again
            _forget(package)
            module = importlib.import_module(package)
            if not later.refused:
                return module
        _forget(package)
    return importlib.import_module(package)


def _forget(package: str) -> None:
    """A failed import leaves submodules behind that a second one would take for complete."""
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
        del sys.modules[name]


class _Refused(Exception):
    """What was asked of a module cannot be put off."""


class _Later(MetaPathFinder, Loader):
    """While it is entered, LATER and what is in them are imported as stand-ins; after it only those who
    imported them have these, and any other import gives the real ones."""

    refused = False

    def __enter__(self) -> _Later:
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *what: object) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _Module) and module._later is self:
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
                    delattr(sys.modules[parent], child)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(f"{fullname}.".startswith(f"{package}.") for package in LATER):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or not str(spec.origin).endswith(".py"):
            return None
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        pass

    def real(self, module: str) -> ModuleType:
        self.__exit__()  # it is used while others are still being imported: these go on as always
        return importlib.import_module(module)


class _Module(ModuleType):
    """A stand-in for a module: it has the names that the source has, and any name once it may be imported."""

    def __init__(self, name: str, later: _Later) -> None:
        super().__init__(name)
        self._later = later

    def __getattr__(self, name: str) -> Any:
        if self._later not in sys.meta_path:
            return getattr(self._later.real(self.__name__), name)
        values = ("__all__", "__version__")  # what an import does not call, but read
        if name.startswith("__") and name not in values:
            raise AttributeError(name)
        source = Path(str(self.__file__)).read_text(encoding="utf-8")
        if name in values or not re.search(rf"\b{re.escape(name)}\b", source):
            self._later.refused = True  # also where somebody catches it
            raise _Refused(f"{self.__name__} may have no {name}")
        return _Name(self._later, self.__name__, name)


class _Name:
    """A stand-in for a function or class: its module is imported when it is called, asked or derived from."""

    def __init__(self, later: _Later, module: str, name: str) -> None:
        self._real = lambda: getattr(later.real(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __instancecheck__(self, thing: object) -> bool:
        return isinstance(thing, self._real())

    def __subclasscheck__(self, kind: type) -> bool:
        return issubclass(kind, self._real())

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type]:
        return (self._real(),)
