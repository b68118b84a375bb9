"""Download data sets into CoOp's layout, or check them: dfzsl prepare"""

from dfzsl.cli.experiments import prepare
from dfzsl.cli.main import run

if __name__ == "__main__":
    run(prepare)
