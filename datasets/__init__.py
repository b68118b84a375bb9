"""Importing this package registers every data set in the folder and adds its config keys to Dassl's.

A new data set is a new file here, nothing else.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "extract":  # a command: `python -m` runs it, and warns if it is imported already
        importlib.import_module(f"{__name__}.{_module.name}")
