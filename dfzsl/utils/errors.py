"""Define UserError, the error of a user's mistake, and turn errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import os
import pickle
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

MAX_MESSAGE_CHARS = 2000  # characters of a message
MAX_LISTED_NAMES = 60  # known names in a message
MEMORY_ADVICE = (
    "lower DATALOADER.TRAIN_X.BATCH_SIZE, DATALOADER.TEST.BATCH_SIZE, RECOVERY.NUM_PER_CLASS or --shots, "
    "or use a smaller backbone"
)
TOKEN = "DFZSL_TEACHER_TOKEN"  # in the environment: for the teacher's server, and for nobody else
# Control characters, line separators, marks that turn the direction of writing, halves of characters.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def remove_token(text: str) -> str:
    """`text` without the token, which a server may have put into what it said."""
    token = os.environ.get(TOKEN, "").strip()
    return text.replace(token, "[token]") if len(token) > 3 else text


def one_line(text: str) -> str:
    """`text` on one line, scrubbed, with what is unprintable spelt out: it must not steer a terminal."""
    text = remove_token(text)
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], " ".join(text.split()))


class UserError(ValueError):
    """A mistake in the input. The command line prints its one line and exits with code 2."""

    def __init__(self, message: str) -> None:
        line = one_line(message)
        half = MAX_MESSAGE_CHARS // 2
        super().__init__(line if len(line) <= MAX_MESSAGE_CHARS else f"{line[:half]} [...] {line[-half:]}")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that no registry holds: the known names, nearest first."""
    names = sorted(known)
    lowered = {n.lower(): n for n in names}
    near = [lowered[m] for m in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)]
    names = near + [n for n in names if n not in near]
    listed = ", ".join(
        names[:MAX_LISTED_NAMES]
        + [f"and {len(names) - MAX_LISTED_NAMES} more"] * (len(names) > MAX_LISTED_NAMES)
    )
    return UserError(f"unknown {kind} '{name}'; known: {listed}")


def describe_user_error(error: BaseException) -> str | None:
    """One line for an error that the user can do something about; None for a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    said = str(error)
    # By its name: this module is imported where torch is not.
    short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if short or "DefaultCPUAllocator" in said:
        return f"out of memory; {MEMORY_ADVICE}"
    died = ("DataLoader worker", "shared memory", "process pool was terminated abruptly")
    if isinstance(error, RuntimeError) and any(words in said for words in died):
        return (
            "a process that decodes images died, most likely for want of memory or of shared memory "
            "(/dev/shm); set DATALOADER.NUM_WORKERS 0, or --workers 0"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return str(UserError(f"{error.filename}: {error.strerror}"))
    if isinstance(error, OSError | pickle.UnpicklingError):
        return str(UserError(said))
    return None


def run_program(run: Callable[[], object]) -> None:
    """Run an entry point: a user's mistake ends as one line on stderr and exit code 2.

    Args:
        run: the program, called without arguments.

    Raises:
        SystemExit: 2 for a user's mistake, 130 for an interruption, 0 for a closed output.
        Exception: a defect of the program.
    """
    try:
        with _quiet_threads():
            run()
    except BrokenPipeError:  # whoever read the output has seen enough: `| head`
        sys.stdout = None
        raise SystemExit(0) from None
    except Exception as error:
        said = describe_user_error(error)
        if said is None:  # a defect of the program
            told = traceback.format_exc()
            if (shown := remove_token(told)) == told:
                raise
            print(shown, end="", file=sys.__stderr__)
            raise SystemExit(1) from None
        print(f"error: {said}", file=sys.__stderr__)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.__stderr__)
        raise SystemExit(130) from None


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Print no traceback for an OSError in a thread: whoever waits for the thread raises it again."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def install_excepthook() -> None:
    """Print a UserError that ends this program as one line, and exit with code 2.

    For a program of your own, e.g. CoOp's `train.py`. It replaces `sys.excepthook`; other errors go to the
    hook that was installed before.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, UserError):
            before(kind, error, trace)
            return
        print(f"error: {error}", file=sys.__stderr__)
        if not hasattr(sys, "ps1"):  # an interactive session goes on
            raise SystemExit(2)

    sys.excepthook = hook
