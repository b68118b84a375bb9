"""Data-free generalized zero-shot learning (Tang et al., AAAI 2024) for the CoOp/Dassl toolbox.

`import dfzsl.trainers` registers every trainer and adds its config keys; `import dfzsl.datasets` does
the same for the data sets.
"""

__version__ = "0.1.0"
