"""What errors say to a user, on one line, and to whoever looks for a fault."""

from __future__ import annotations

import logging
import os

log = logging.getLogger("bsafusion")
"""At level debug, the traceback of every error that a user saw as one line; see :func:`show_tracebacks`."""

_FOR_USERS = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError)


def one_line(error: BaseException) -> str:
    """What an error says, with its type where no such error is raised for a user's sake: then it is a fault of ours."""
    text = " ".join(str(error).split())
    if text and isinstance(error, _FOR_USERS):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def show_tracebacks() -> None:
    """Show them on stderr where the environment has ``BSAFUSION_DEBUG``."""
    if os.environ.get("BSAFUSION_DEBUG"):
        logging.basicConfig()
        log.setLevel(logging.DEBUG)
