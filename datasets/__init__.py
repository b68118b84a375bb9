"""Register every data set of this folder and add its config keys to Dassl's, on import.

A new data set is a new file in this folder.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "extract":  # a command: `python -m` warns about a module that is imported already
        importlib.import_module(f"{__name__}.{_module.name}")
