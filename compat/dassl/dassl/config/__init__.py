"""The default configuration, as a yacs node."""

from yacs.config import CfgNode

from .defaults import _C as cfg_default

__all__ = ["cfg_default", "clean_cfg", "get_cfg_default"]


def get_cfg_default() -> CfgNode:
    """A fresh copy of the defaults, ready for `merge_from_file` and `merge_from_list`."""
    return cfg_default.clone()


def clean_cfg(cfg: CfgNode, trainer: str) -> None:
    """Drop, in place, the settings of every trainer but `trainer` from `cfg.TRAINER`."""
    for key in list(cfg.TRAINER):
        if key not in ("NAME", trainer.upper()):
            cfg.TRAINER.pop(key)
