"""Serve a teacher over HTTP, with tokens and query budgets.

`create_app` and `serve` need PyTorch and FastAPI, which are imported when they are first used. `Ledger` and
`default_ledger` need neither.
"""

from typing import TYPE_CHECKING, Any

from .ledger import Ledger, default_ledger

if TYPE_CHECKING:
    from .app import create_app, serve

__all__ = ["Ledger", "create_app", "default_ledger", "serve"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from . import app

    return getattr(app, name)
