"""Importing this package registers every data set in the folder and adds its config keys to Dassl's."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
