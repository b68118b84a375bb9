"""Provide the command `dfzsl` and the error handling of all commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import click

from dfzsl.utils.errors import UserError, run_program

from . import client, experiments, inspect_files, owner
from .options import HELP, OrderedGroup


@click.group(
    cls=OrderedGroup,
    context_settings=HELP,
    epilog="""Shell completion: eval "$(_DFZSL_COMPLETE=bash_source dfzsl)" in ~/.bashrc (or zsh_source,
    fish_source). CoOp's command line: python train.py.""",
)
@click.version_option(package_name="dfzsl")
@click.pass_context
def main(context: click.Context) -> None:
    """Data-free generalized zero-shot learning with CLIP.

    A data owner fits a teacher on images of base classes. A client has the teacher, or only query access to
    it, and the names of new classes, and builds one classifier for base and new classes without images.
    """
    from dfzsl.utils.progress import hide_progress_bars

    context.with_resource(hide_progress_bars(not sys.stderr.isatty()))


for _command in (
    *(client.build, client.add, client.predict, client.evaluate, client.export),
    *(inspect_files.show, inspect_files.geometry, owner.teacher),
    *experiments.launch.commands.values(),
    *(experiments.report, experiments.plot, experiments.prepare, experiments.extract),
):
    main.add_command(_command)


def invoke(command: click.Command, args: Sequence[str] | None = None) -> None:
    """Run a click command within this process.

    Args:
        command: the command.
        args: arguments of the command line; by default those of this process.

    Raises:
        UserError: the arguments are wrong, or the command raised it.
        SystemExit: the command returned a nonzero exit code.
    """
    try:
        # In standalone mode click prints several lines for a usage error.
        code = command.main(args, standalone_mode=False, **HELP)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        raise SystemExit(2) from None
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "dfzsl"
        raise UserError(f"{error.format_message()} ({path} --help)") from None
    if code:
        raise SystemExit(code)


def run(command: click.Command) -> None:
    """Run a click command as a program: a mistake of the user is one line on stderr and exit code 2."""
    warnings = logging.StreamHandler()
    warnings.setLevel(logging.WARNING)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[warnings])
    run_program(lambda: invoke(command))
    sys.exit()


def entry() -> None:
    """Run `dfzsl`, the console script."""
    run(main)


if __name__ == "__main__":
    entry()
