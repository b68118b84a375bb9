"""CoOp's command line: python train.py --trainer CoOp --config-file FILE ... KEY VALUE"""

from dfzsl.train import cli, main

if __name__ == "__main__":
    cli(main)
