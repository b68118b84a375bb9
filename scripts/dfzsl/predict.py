"""Classify images with the classifier of a run: dfzsl predict"""

import sys

from dfzsl.cli.main import entry

if __name__ == "__main__":
    sys.argv.insert(1, "predict")
    entry()
