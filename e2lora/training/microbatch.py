"""The largest microbatch that fits in memory: the fewest accumulation steps for a global batch.

What a microbatch takes grows with its rows in a straight line, so two small ones tell what larger
ones will take. On a GPU those are then really tried; a machine without one rather kills a process
than tells it, so there the estimate decides.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e2lora.memory import available_bytes
from e2lora.training.health import OutOfMemory, is_out_of_memory

Run = Callable[[int], None]
"""Forward and backward of so many of the longest rows, without a step of the optimizer."""

GPU_MARGIN = 0.9  # what fragments are left over, and what a step needs besides
CPU_MARGIN = 0.7  # other processes come and go


class Memory(Protocol):
    """A device's memory.

    ``limit``: bytes that may be in use; ``tries``: whether sizes that should fit are tried, too.
    """

    limit: int
    tries: bool

    def used(self, run: Run, num_rows: int) -> int:
        """Bytes in use at the worst moment of ``run(num_rows)``; may raise torch's errors."""
        ...


# ---- the search -------------------------------------------------------------------------------


def find_accumulation(run: Run, num_rows_of_worker: int, memory: Memory, group: Any = None) -> int:
    """Microbatches per step: a divisor of the worker's share of the global batch, the least one.

    All workers take the smallest microbatch of any, and try the same sizes together: ``run`` may
    be collective. Random states are as before.

    Args:
        num_rows_of_worker: rows of the global batch that each worker takes.
        group: process group of all workers, or None for one.

    Raises:
        OutOfMemory: not even one row fits.
    """
    measured: dict[int, int] = {}
    largest = 0
    with _same_random_numbers():
        for size in (n for n in range(1, num_rows_of_worker + 1) if not num_rows_of_worker % n):
            if not _fits(run, size, memory, measured, group):
                break
            largest = size
    if not largest:
        need = measured.get(1)
        raise OutOfMemory(
            "one row of the longest must fit a worker's memory; it takes "
            f"{'more' if need is None else f'{need / 2**30:.2f} GiB'}, and there is "
            f"{memory.limit / 2**30:.2f} GiB. Shorten `max_length`, set "
            "activation_checkpointing='non_reentrant', use precision='bf16', or a higher "
            "`zero_stage` with more workers."
        )
    return num_rows_of_worker // largest


def _fits(run: Run, size: int, memory: Memory, measured: dict[int, int], group: Any) -> bool:
    """On every worker; what it took goes into ``measured``. Collective."""
    if size > 1 and len(measured) == 1 and not _try(run, 2, memory, measured, group):
        return False  # the second point of the line, also where 2 divides nothing
    if len(measured) >= 2:
        if not _agreed(_expected(measured, size) <= memory.limit, group):
            return False
        if not memory.tries:
            return True
    return _try(run, size, memory, measured, group)


def _try(run: Run, size: int, memory: Memory, measured: dict[int, int], group: Any) -> bool:
    if size in measured:
        return _agreed(measured[size] <= memory.limit, group)
    used: int | None = None
    try:
        used = memory.used(run, size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if used is None:  # outside of `except`: the error holds the tensors of its frames
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    else:
        measured[size] = used
    return _agreed(used is not None and used <= memory.limit, group)


def _expected(measured: dict[int, int], size: int) -> float:
    """On the line through the two largest sizes, which never falls."""
    (n, low), (m, high) = sorted(measured.items())[-2:]
    return high + max(0.0, (high - low) / (m - n)) * (size - m)


def _agreed(holds: bool, group: Any) -> bool:
    """Whether it holds on all workers. Collective."""
    if group is None:
        return holds
    told = torch.tensor(int(holds))
    dist.all_reduce(told, op=dist.ReduceOp.MIN, group=group)
    return bool(told)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


# ---- what is run ------------------------------------------------------------------------------


def forward_and_backward(
    model: Any,
    batch_of: Callable[[int], dict[str, Tensor]],
    loss_sum: Callable[[Any, dict[str, Tensor]], Tensor],
    device: torch.device,
) -> Run:
    """A :data:`Run` of an adapted model, before its engine starts; it leaves no gradients.

    Args:
        batch_of: so many of the longest rows, as a microbatch on the CPU.
    """

    def run(num_rows: int) -> None:
        was_training = model.training
        model.train()
        try:
            inputs = {key: value.to(device) for key, value in batch_of(num_rows).items()}
            loss_sum(model, inputs).backward()
        finally:
            model.train(was_training)
            for parameter in model.parameters():
                parameter.grad = None

    return run


# ---- memories ---------------------------------------------------------------------------------


class GpuMemory:
    """Of a CUDA device, by torch's own count.

    Args:
        share: of the device that is this worker's.
        reserved: bytes that come later: masters and moments of what is trained.
    """

    tries = True

    def __init__(self, device: torch.device, share: float = 1.0, reserved: int = 0) -> None:
        self._device = device
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)
        self.limit = int(GPU_MARGIN * min(free + own, share * total)) - reserved

    def used(self, run: Run, num_rows: int) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run(num_rows)
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_allocated(self._device))


class CpuMemory:
    """Of the machine or, if less, of the control group that this process is in.

    Args:
        num_workers: on this machine, which all want the same.
        reserved: bytes that come later: masters and moments of what is trained.
        available: bytes; None: read from the system.
    """

    tries = False

    def __init__(
        self, num_workers: int = 1, reserved: int = 0, available: int | None = None
    ) -> None:
        available = available_bytes() if available is None else available
        self.limit = int(CPU_MARGIN * available / num_workers) - reserved

    def used(self, run: Run, num_rows: int) -> int:
        with NewTensors() as tensors:
            run(num_rows)
        return tensors.peak


class NewTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it, as long as each lives.

    ``peak`` is the most at any moment, gradients and passing ones included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor, new=True)
        return result

    def _see(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or storage.device.type == "meta":
            return
        size = storage.nbytes() if new else 0
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf
