"""Read the weights of a linear scikit-learn classifier that skops saved."""

from __future__ import annotations

import numpy as np
from skops.io import load
from skops.io.exceptions import UntrustedTypesFoundException

from dfzsl.utils.errors import UserError


def read_linear_classifier(path: str) -> dict[str, np.ndarray]:
    """Read `coef_`, `classes_` and, unless it is zero, `intercept_`.

    skops does not limit memory: call this through `memory_limited.read_arrays`.

    Raises:
        UserError: the file is broken, holds types that skops does not trust, or is another model.
        MemoryError: reading needs more memory than this process may use.
    """
    try:
        model = load(path, trusted=[])
        if not hasattr(model, "coef_"):
            raise UserError(f"{path}: a {type(model).__name__} is not a linear classifier with a coef_")
        arrays = {"coef_": np.asarray(model.coef_, dtype=np.float64)}
        if np.any(getattr(model, "intercept_", 0.0)):
            arrays["intercept_"] = np.asarray(model.intercept_, dtype=np.float64)
        return arrays | {"classes_": np.array([str(name) for name in np.asarray(model.classes_).tolist()])}
    except (UserError, MemoryError):
        raise
    except UntrustedTypesFoundException as error:
        raise UserError(f"{path}: it has types that are not scikit-learn's own ({error})") from None
    except Exception as error:  # skops and its dependencies raise many types for a broken archive
        raise UserError(f"{path}: it cannot be read as .skops ({error})") from None
