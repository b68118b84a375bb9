"""Provide UserError for mistakes of the user, and convert errors to one-line messages and exit codes."""

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

MAX_MESSAGE_CHARS = 2000
MAX_LISTED_NAMES = 60
MEMORY_ADVICE = (
    "lower DATALOADER.TRAIN_X.BATCH_SIZE, DATALOADER.TEST.BATCH_SIZE, RECOVERY.NUM_PER_CLASS or --shots, "
    "or use a smaller backbone"
)
TOKEN = "DFZSL_TEACHER_TOKEN"  # environment variable of the secret that is sent to the teacher's server only
# Control characters, line separators, bidirectional formatting characters, surrogates.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def remove_token(text: str) -> str:
    """Replace the teacher's token in a text, e.g. in an error message that a server echoes."""
    token = os.environ.get(TOKEN, "").strip()
    return text.replace(token, "[token]") if len(token) > 3 else text


def one_line(text: str) -> str:
    """Return a text on one line, without the token and with unprintable characters escaped."""
    text = remove_token(text)
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], " ".join(text.split()))


class UserError(ValueError):
    """A mistake in the input. The command line prints its message on one line and exits with code 2."""

    def __init__(self, message: str) -> None:
        line = one_line(message)
        half = MAX_MESSAGE_CHARS // 2
        super().__init__(line if len(line) <= MAX_MESSAGE_CHARS else f"{line[:half]} [...] {line[-half:]}")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown name. Its message lists the known names, the most similar ones first.

    Args:
        kind: what is named, e.g. "trainer".
        name: the unknown name.
        known: the known names.
    """
    names = sorted(known)
    by_lower_case = {n.lower(): n for n in names}
    matches = difflib.get_close_matches(name.lower(), list(by_lower_case), n=3, cutoff=0.5)
    similar = [by_lower_case[match] for match in matches]
    names = similar + [n for n in names if n not in similar]
    omitted = len(names) - MAX_LISTED_NAMES
    listed = ", ".join(names[:MAX_LISTED_NAMES] + [f"and {omitted} more"] * (omitted > 0))
    return UserError(f"unknown {kind} '{name}'; known: {listed}")


def describe_user_error(error: BaseException) -> str | None:
    """Return one line for an error that the user can fix, or None for a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    message = str(error)
    # torch.OutOfMemoryError is compared by name, because this module must not import torch.
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "DefaultCPUAllocator" in message:
        return f"out of memory; {MEMORY_ADVICE}"
    worker_failures = ("DataLoader worker", "shared memory", "process pool was terminated abruptly")
    if isinstance(error, RuntimeError) and any(words in message for words in worker_failures):
        return (
            "a process that decodes images died, probably for lack of memory or of shared memory "
            "(/dev/shm); set DATALOADER.NUM_WORKERS 0, or --workers 0"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return str(UserError(f"{error.filename}: {error.strerror}"))
    if isinstance(error, OSError | pickle.UnpicklingError):
        return str(UserError(message))
    return None


def run_program(run: Callable[[], object]) -> None:
    """Run an entry point; print a mistake of the user as one line on stderr and exit with code 2.

    Args:
        run: the program, called without arguments.

    Raises:
        SystemExit: 2 for a mistake of the user, 130 for an interruption, 0 if the output was closed.
        Exception: a defect of the program.
    """
    try:
        with _suppress_thread_tracebacks():
            run()
    except BrokenPipeError:  # the reader of the output has ended, e.g. `| head`
        sys.stdout = None
        raise SystemExit(0) from None
    except Exception as error:
        message = describe_user_error(error)
        if message is None:  # a defect of the program
            trace = traceback.format_exc()
            if (redacted := remove_token(trace)) == trace:
                raise
            print(redacted, end="", file=sys.__stderr__)
            raise SystemExit(1) from None
        print(f"error: {message}", file=sys.__stderr__)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.__stderr__)
        raise SystemExit(130) from None


@contextlib.contextmanager
def _suppress_thread_tracebacks() -> Iterator[None]:
    """Print no traceback for an OSError in a thread: the thread that waits for it raises the error again."""
    previous = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            previous(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous


def install_excepthook() -> None:
    """Print a UserError that ends this program as one line, and exit with code 2.

    Use this in your own program, e.g. CoOp's `train.py`. It replaces `sys.excepthook`; other errors are
    passed to the previous hook.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, UserError):
            previous(kind, error, trace)
            return
        print(f"error: {error}", file=sys.__stderr__)
        if not hasattr(sys, "ps1"):  # an interactive session continues
            raise SystemExit(2)

    sys.excepthook = hook
