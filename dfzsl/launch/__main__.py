"""Run `dfzsl base2new`, gzsl, xd, dg or fewshot as `python -m dfzsl.launch PROTOCOL`."""

from __future__ import annotations

from collections.abc import Sequence

from dfzsl.cli.experiments import launch
from dfzsl.cli.main import invoke, run


def main(args: Sequence[str] | None = None) -> None:
    """Run the command in this process.

    Raises:
        UserError: the arguments or the data are wrong, or runs failed.
    """
    invoke(launch, args)


if __name__ == "__main__":
    run(launch)
