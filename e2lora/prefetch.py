"""Values that a thread makes ahead of their use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any, TypeVar

Value = TypeVar("Value")

AHEAD = 4  # values that wait at most


@contextmanager
def made_ahead(make: Callable[[int], Value], numbers: range) -> Iterator[Iterator[Value]]:
    """``make`` of each number, in order, made by a thread that ends when the context is left.

    What ``make`` raises is raised where its value would have been.

    >>> with made_ahead(lambda n: n * n, range(3)) as squares:
    ...     list(squares)
    [0, 1, 4]
    """
    ready: Queue[Any] = Queue(AHEAD)
    left = threading.Event()

    def work() -> None:
        for number in numbers:
            try:
                made = (make(number), None)
            except BaseException as error:  # the consumer's to handle, whatever it is
                ready.put((None, error))
                return
            ready.put(made)
            if left.is_set():
                return

    def values() -> Iterator[Value]:
        for _ in numbers:
            if left.is_set():
                return
            value, error = ready.get()
            if error is not None:
                raise error
            yield value

    worker = threading.Thread(target=work, name="made ahead", daemon=True)
    worker.start()
    try:
        yield values()
    finally:
        left.set()
        try:  # makes room for the one put that may be waiting; after it the thread looks at `left`
            while True:
                ready.get_nowait()
        except Empty:
            pass
        worker.join()
