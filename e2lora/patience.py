"""Writing to a storage that fails for a while, as network file systems and full disks do."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

Written = TypeVar("Written")

PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EDQUOT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.ENETUNREACH,
        errno.ENOLCK,
        errno.ENOSPC,
        errno.ENOTCONN,
        errno.EROFS,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
"""What an operating system says of a storage that others, or time, may mend."""

PATIENCE_SECONDS = float(os.environ.get("E2LORA_STORAGE_PATIENCE_S") or 60.0)
LONGEST_PAUSE_SECONDS = 5.0


def is_storage_fault(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is one of the storage and not of who writes.

    >>> is_storage_fault(OSError(errno.ENOSPC, "No space left on device"))
    True
    >>> is_storage_fault(FileNotFoundError(errno.ENOENT, "No such file"))
    False
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in PASSING:
            return True
        error = error.__cause__
    return False


def patiently(write: Callable[[], Written], seconds: float | None = None) -> Written:
    """Write, and again while the storage fails in a way that may pass.

    Args:
        write: may be called again after it failed halfway.
        seconds: for how long; None: ``PATIENCE_SECONDS``.

    Raises:
        OSError: of the last try.
    """
    deadline = time.monotonic() + (PATIENCE_SECONDS if seconds is None else seconds)
    pause = 0.1
    while True:
        try:
            return write()
        except OSError as error:
            if not is_storage_fault(error) or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
