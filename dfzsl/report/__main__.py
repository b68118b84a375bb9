"""Tables and one HTML page from the results of runs, in the folders that dfzsl.launch makes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dfzsl.utils.errors import UserError

from . import FORMATS, collect, collect_logs, sections, show
from .method_names import glossary


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m dfzsl.report", description=__doc__)
    flags.add_argument(
        "output", nargs="?", type=Path, help="an output folder or a protocol's: output, output/base2new"
    )
    flags.add_argument("--format", choices=FORMATS, default="terminal", help="of the tables")
    flags.add_argument("--html", type=Path, metavar="FILE", help="write one page with tables and plots too")
    flags.add_argument("--published", action="store_true", help="show published figures beside measured ones")
    flags.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="read the logs of CoOp below FOLDER too (train_base/...)"
    )
    flags.add_argument("--glossary", action="store_true", help="only say what the names in tables mean")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser()
    args = flags.parse_args(argv)
    if args.glossary:
        print(glossary(), end="")
        return
    if not args.output and not args.logs:
        flags.error("give an output folder, --logs FOLDER, or both")
    outcomes = collect(args.output) if args.output else []
    outcomes += collect_logs(args.logs) if args.logs else []
    parts = sections(outcomes, published=args.published)
    if args.html:
        from .page import write_page

        write_page(args.html, parts)
    if args.format == "terminal":
        show(parts)
    else:
        print(FORMATS[args.format](parts), end="")
    if args.html:
        print(f"wrote {args.html}", file=sys.stderr)
    if args.published and not any(row.source for part in parts for row in part.summaries):
        print("no published figures of these data sets are known", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        raise SystemExit(0) from None
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
