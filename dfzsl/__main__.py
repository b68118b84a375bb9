"""Run `dfzsl` as `python -m dfzsl`; torchrun starts ranks this way."""

from dfzsl.cli.main import entry

if __name__ == "__main__":
    entry()
