"""Plot real and virtual features of a finished run: dfzsl plot"""

from dfzsl.cli.experiments import plot
from dfzsl.cli.main import run

if __name__ == "__main__":
    run(plot)
