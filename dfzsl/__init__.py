"""Data-free generalized zero-shot learning (Tang et al., AAAI 2024) for the CoOp/Dassl toolbox.

The public API, imported on first use:

    load_teacher, fit_teacher, open_oracle, measure_feature_statistics, recover, align, generate, build,
    Classifier, load_classifier, evaluate

`import dfzsl.trainers` registers every trainer and adds its config keys; `import dfzsl.datasets` does the
same for the data sets. If `dassl` is not installed, this package appends its own replacement to `sys.path`.
"""

import importlib.util
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

__version__ = "0.3.0.dev0"

if importlib.util.find_spec("dassl") is None:
    # The replacement is part of the installed package, or of its checkout.
    for _folder in (Path(__file__).parent / "drop_in", Path(__file__).parents[1] / "compat" / "dassl"):
        if (_folder / "dassl").is_dir():
            sys.path.append(str(_folder))
            break

_PUBLIC = {
    "Classifier": "trainers.generation.classifier:Classifier",
    "align": "client.build:align",
    "build": "client.build:build",
    "evaluate": "client.evaluate:evaluate",
    "generate": "trainers.generation.generate:generate",
    "fit_teacher": "trainers.recovery.teacher:fit_teacher",
    "load_classifier": "trainers.generation.classifier:Classifier.load",
    "load_teacher": "trainers.recovery.teacher:Teacher.load",
    "measure_feature_statistics": "trainers.recovery.feature_statistics:measure_feature_statistics",
    "open_oracle": "trainers.recovery.open_oracle:open_oracle",
    "recover": "trainers.recovery.recover:recover",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return resolve_name(f"{__name__}.{_PUBLIC[name]}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
