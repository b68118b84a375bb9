"""Download data sets into CoOp's layout, or check what is there: python -m dfzsl.prepare"""

from dfzsl.prepare.__main__ import main
from dfzsl.train import cli

if __name__ == "__main__":
    cli(main)
