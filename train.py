"""Run CoOp's command line: python train.py --trainer CoOp --config-file FILE ... KEY VALUE"""

from dfzsl.train import main
from dfzsl.utils.errors import run_program

if __name__ == "__main__":
    run_program(main)
