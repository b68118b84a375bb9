"""Classes by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Registry"]


class Registry:
    """Maps names to classes (or functions).

    >>> THINGS = Registry("THING")
    >>> @THINGS.register()
    ... class Thing: ...
    >>> THINGS.get("Thing")
    <class 'dassl.utils.registry.Thing'>
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._obj_map: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._obj_map

    def _do_register(self, name: str, obj: Any, force: bool) -> None:
        if name in self._obj_map and not force:
            raise KeyError(f'An object named "{name}" was already registered in "{self._name}" registry')
        self._obj_map[name] = obj

    def register(self, obj: Any = None, force: bool = False) -> Any:
        """Register `obj` under its `__name__`, or, without `obj`, be the decorator that does so.

        Raises KeyError where the name is taken, unless `force`.
        """
        if obj is not None:
            self._do_register(obj.__name__, obj, force)
            return None

        def decorate(decorated: Any) -> Any:
            self._do_register(decorated.__name__, decorated, force)
            return decorated

        decorator: Callable[[Any], Any] = decorate
        return decorator

    def offer(self, obj: Any) -> Any:
        """Decorator: register `obj` unless its name is taken, as it is where others bring their own."""
        self._obj_map.setdefault(obj.__name__, obj)
        return obj

    def get(self, name: str) -> Any:
        """The object of that name; KeyError if there is none."""
        if name not in self._obj_map:
            raise KeyError(f'Object name "{name}" does not exist in "{self._name}" registry')
        return self._obj_map[name]

    def registered_names(self) -> list[str]:
        return list(self._obj_map)
