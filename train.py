"""CoOp's command line. `python train.py --trainer CoOp --dataset-config-file ... --config-file ... KEY VALUE`"""

from dfzsl.train import cli

if __name__ == "__main__":
    cli()
