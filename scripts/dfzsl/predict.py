"""Classify images with the classifier of a run: dfzsl predict"""

from dfzsl.cli.client import predict
from dfzsl.cli.main import run

if __name__ == "__main__":
    run(predict)
