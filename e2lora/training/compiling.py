"""``torch.compile`` of an adapted model, for one trial."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SWITCH = "TORCHDYNAMO_DISABLE"


@contextmanager
def compiled(model: nn.Module, backend: Any = "inductor") -> Iterator[None]:
    """Calls of ``model`` run compiled within; its modules, names and parameters stay as they are.

    Sizes are left open, since batches have many lengths: one graph serves them all. What was
    compiled is forgotten afterwards: the next trial's model is another one, and torch falls back to
    plain calls, without an error, after eight versions of a function.
    """
    before = os.environ.pop(SWITCH, None)  # set by import_deepspeed, and read by the next line
    try:
        model.compile(backend=backend, dynamic=True)
    finally:
        if before is not None:
            os.environ[SWITCH] = before
    try:
        yield
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()
