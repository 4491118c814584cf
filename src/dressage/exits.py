"""What went wrong becomes a line or two and an exit code: the one place where it does."""

from __future__ import annotations

import errno
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from dressage.errors import DressageError

NOT_TO_BE_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
NO_MEMORY = (
    "out of memory; lower training.micro_batch_tokens, rollout.max_batch (sample: max_batch) or the length of texts,"
    " and give the command again: it goes on"
)
LONGEST_LINE = 500
"""Characters of an error: what a file says of itself may have no end."""
# What click raises at a command line it cannot read; typer brings its own copy of click, or not, by its version.
CommandLineError: Any = typer.BadParameter.__base__


class Verbs(TyperGroup):
    """The verbs, and the one place where what went wrong becomes a line and an exit code."""

    def make_context(self, *given: Any, **more: Any) -> Any:
        """Reads the options that all verbs share."""
        with _command_line():
            return super().make_context(*given, **more)

    def invoke(self, ctx: Any) -> Any:
        """Runs a verb: 2 after an error that the user can put right, 130 after Ctrl-C."""
        debug = bool(ctx.params.get("debug"))
        before, threading.excepthook = threading.excepthook, _thread_failed
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning  # type: ignore[assignment]
                with _command_line():
                    return super().invoke(ctx)
        except DressageError as error:
            _complain(str(error), getattr(error, "__notes__", ()), debug)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if error.errno not in NOT_TO_BE_WRITTEN and error.filename is None:
                raise
            place = f"{error.filename}: " if error.filename else ""
            _complain(f"{place}{error.strerror}; put that right and give the same command again", debug=debug)
            raise typer.Exit(DressageError.exit_code) from error
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            _complain(NO_MEMORY, debug=debug)
            raise typer.Exit(DressageError.exit_code) from error
        except KeyboardInterrupt as error:
            _complain("", ["interrupted; the same command goes on from the last checkpoint"], debug)
            raise typer.Exit(130) from error
        finally:
            threading.excepthook = before


def _out_of_memory(error: Exception) -> bool:
    """As Python, PyTorch on a CPU, PyTorch on a GPU and the system (for a thread's stack) say it."""
    said = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises again where it is next used; what else fails in a thread shows itself."""
    error = failure.exc_value
    if not (isinstance(error, OSError) and error.errno in NOT_TO_BE_WRITTEN):
        threading.__excepthook__(failure)


@contextmanager
def _command_line() -> Iterator[None]:
    """Within, a verb or an option that there is not becomes a line, like all other errors."""
    try:
        yield
    except CommandLineError as error:
        said, where = error.format_message(), getattr(error.ctx, "command_path", "dressage")
        if "\n" in said:  # the help, for a command line without a verb
            raise
        _complain(f"{where}: {said.rstrip('.')}; `{where} --help` lists what there is")
        raise typer.Exit(error.exit_code) from error


def _complain(message: str, notes: Sequence[str] = (), debug: bool = False) -> None:
    if debug:
        traceback.print_exc()
    for line in message.splitlines():
        print(f"error: {_plain(line)}", file=sys.stderr)
    for note in notes:
        print(note, file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"warning: {_plain(str(message))}", file=sys.stderr)


def _plain(line: str) -> str:
    """What is quoted from a file does not steer the terminal, and has an end."""
    told = "".join(letter if letter.isprintable() else "?" for letter in line)
    return told if len(told) <= LONGEST_LINE else f"{told[: LONGEST_LINE - 3]}..."
