"""Classify images with the classifier of a run: python -m dfzsl.predict"""

from dfzsl.predict import main
from dfzsl.train import cli

if __name__ == "__main__":
    cli(main)
