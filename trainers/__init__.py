"""Register every trainer of this folder and add its config keys to Dassl's, on import.

In a CoOp checkout, one line in `train.py` makes the trainers available:

    import dfzsl.trainers

A second line is optional. It prints user errors as one line, without a traceback, and exits with code 2:

    from dfzsl.utils.errors import install_excepthook; install_excepthook()

A new trainer is a new file in this folder. The sub-packages hold the components of trainers.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
