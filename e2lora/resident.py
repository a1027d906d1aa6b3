"""What a worker keeps in memory between jobs: base models, and the tokenised rows of tasks."""

from __future__ import annotations

from typing import Any

import torch

from e2lora.adapters import FAMILIES
from e2lora.config import AdapterConfig, GroupSpec, TrialConfig
from e2lora.device import DTYPES, require_device_can
from e2lora.models import Base, load_base
from e2lora.partitioned import Partitioning, bytes_held, move
from e2lora.tasks import Task, TrialData, load_task
from e2lora.tokens import tokenised
from e2lora.weights import own_weights, weights_fingerprint, wrapped_modules

KEPT_BYTES = 4 * 2**30


class Resident:
    """What a worker keeps between jobs: base models, and the tokenised tasks.

    Args:
        kept_bytes: of base models that no job uses now; those used longest ago go first.
    """

    def __init__(
        self,
        spec: GroupSpec,
        device: torch.device,
        group: Any = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.spec, self.device, self._group, self._kept_bytes = spec, device, group, kept_bytes
        self.dtype = DTYPES[spec.precision]
        self._bases: dict[str, Base] = {}  # the one used last stands last
        self._adapter: AdapterConfig | None = None
        self._data: dict[str, TrialData] = {}

    def load(self, config: TrialConfig) -> tuple[Base, TrialData]:
        """The base and the data of a trial, from memory where they are there already.

        Raises:
            ValueError: the device can't train it, or the data or the model can't be used.
        """
        require_device_can(config.training, config.model, self.device)
        key, self._adapter = config.model.fingerprint(), config.adapter
        data_key = f"{config.task.fingerprint()}-{key}"
        task = self._data[data_key].task if data_key in self._data else load_task(config.task)
        base = self._base(f"{key}-{task.auto_class.__name__}-{task.num_labels}", config, task)
        if data_key not in self._data:
            self._data[data_key] = tokenised(task, base.processor)
        return base, self._data[data_key]

    def _base(self, key: str, config: TrialConfig, task: Task) -> Base:
        base = self._bases.pop(key, None)
        sizes = {other: _num_bytes(idle.model) for other, idle in self._bases.items()}
        for other in list(sizes):
            if sum(sizes.values()) > self._kept_bytes:
                del self._bases[other], sizes[other]
        if self.device.type == "cuda":  # its memory is for the job
            for idle in self._bases.values():
                move(idle.model, torch.device("cpu"))
        if base is None:
            base = load_base(
                config.model,
                task.auto_class,
                task.num_labels,
                self.dtype,
                self.device,
                Partitioning.of(self.spec, self.dtype),
                task.processor,
            )
        move(base.model, self.device)
        self._bases[key] = base
        return base

    def drop_base(self) -> None:
        """The base used last is loaded anew when it is next wanted."""
        if self._bases:
            self._bases.popitem()

    def drop_changed_base(self) -> None:
        """Between jobs the base must be as it was loaded; otherwise the next job loads it anew."""
        if not self._bases:
            return
        key, base = list(self._bases.items())[-1]
        if (
            wrapped_modules(base.model)
            or weights_fingerprint(base.model, skip=base.head) != base.fingerprint
        ):
            adapter = self._adapter
            meant = adapter and FAMILIES[adapter.family].touches_base(adapter)
            why = "as its adapter must" if meant else "though it must not: please report it"
            print(f"the last job changed the base model, {why}; it is loaded again", flush=True)
            del self._bases[key]


def _num_bytes(model: Any) -> int:
    return sum(bytes_held(tensor) for _, tensor in own_weights(model))
