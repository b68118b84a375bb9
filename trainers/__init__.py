"""Importing this package registers every trainer in the folder and adds its config keys to Dassl's.

That one line plugs the project into a CoOp checkout. A new trainer is a new file here, nothing else;
the packages beside them are what trainers are made of.
"""

import importlib
import pkgutil

from dfzsl.utils.errors import tell_mistakes

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
tell_mistakes()
