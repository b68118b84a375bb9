"""Real beside virtual features of a finished run, in one picture: python -m dfzsl.report.diagnostics"""

from dfzsl.report.diagnostics import main
from dfzsl.train import cli

if __name__ == "__main__":
    cli(main)
