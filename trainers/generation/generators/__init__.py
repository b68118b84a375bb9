"""Provide generators of features for classes without images, one per file.

A generator is fitted to features (n, d) of base classes and their conditions (text embeddings). It then
generates features of any class from its condition:

    model = GENERATORS["cvae"](feature_dim, condition_dim, epochs=20)
    model.fit(features, labels, conditions, generator)
    new = model.sample(new_conditions, 200, generator)
"""

import importlib
import pkgutil

from .base import GENERATORS, FeatureGenerator, NeuralGenerator, build_generator, generator, load_generator

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "GENERATORS",
    "FeatureGenerator",
    "NeuralGenerator",
    "build_generator",
    "generator",
    "load_generator",
]
