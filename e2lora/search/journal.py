"""The ledger as Optuna's journal in a file, which holds whole lines only."""

from __future__ import annotations

import os
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from e2lora.patience import patiently


class Journal(JournalFileBackend):
    """Optuna's, for one writer; what was not written to its end is taken back.

    A disk that fills up leaves half a line. The next one would be appended to that half, and
    the journal could never be read again.
    """

    def __init__(self, file: str) -> None:
        super().__init__(file, lock_obj=JournalFileOpenLock(file))
        self._file = file
        self._cut(_whole_lines(file))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        size = os.path.getsize(self._file)

        def append() -> None:
            try:
                super(Journal, self).append_logs(logs)
            except OSError:
                self._cut(size)
                raise

        patiently(append)

    def _cut(self, size: int) -> None:
        if os.path.getsize(self._file) > size:
            os.truncate(self._file, size)


def _whole_lines(file: str) -> int:
    """Bytes up to the end of the last line that has one."""
    with open(file, "rb") as journal:
        return journal.read().rfind(b"\n") + 1
