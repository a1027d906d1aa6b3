"""Whole parameters and Adam moments of an engine, wherever a stage of ZeRO keeps them.

Stage 0 keeps them as they are; stages 1 and 2 in flat partitions of float32 masters and moments;
stage 3 likewise, and the parameters too. Reading and writing is collective above stage 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from e2lora.partitioned import part_of

MOMENTS = ("exp_avg", "exp_avg_sq")


class WholeStates:
    """Of stage 0.

    Args:
        engine: DeepSpeed's.
        adam: the optimizer that it was given.
    """

    def __init__(self, engine: Any, adam: Any) -> None:
        self._zero, self._adam = engine.optimizer, adam

    def _held(self) -> Iterator[Any]:
        """What the optimizer steps: parameters, or this worker's parts of masters."""
        for group in self._adam.param_groups:
            yield from group["params"]

    def value(self, parameter: Any) -> Tensor:
        """The master's, where there is one."""
        value: Tensor = parameter.detach()
        return value

    def set_value(self, parameter: Any, value: Tensor) -> None:
        parameter.data.copy_(value)

    def gradient(self, parameter: Any) -> Tensor | None:
        """Of the whole batch, between backward and step."""
        gradient: Tensor | None = parameter.grad
        return gradient

    def moment(self, parameter: Any, key: str) -> Tensor:
        """Zeros before the first step, and of a parameter that the loss doesn't reach."""
        none = torch.zeros_like(parameter)
        moment: Tensor = self._adam.state[parameter].get(key, none)
        return moment

    def set_moment(self, parameter: Any, key: str, value: Tensor) -> None:
        self._adam.state[parameter][key].copy_(value)

    def steps(self) -> Tensor:
        """How many the optimizer has made."""
        made = (state["step"] for state in self._adam.state.values() if state)
        return torch.as_tensor(next(made, 0.0), dtype=torch.float32).clone()

    def begin(self, steps: Tensor) -> None:
        """Moments of zero after so many steps, to be set."""
        for held in self._held():
            moments = {key: torch.zeros_like(held, requires_grad=False) for key in MOMENTS}
            self._adam.state[held] = {"step": steps.clone(), **moments}


class FlatStates(WholeStates):
    """Of stages 1 and 2."""

    def value(self, parameter: Any) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def set_value(self, parameter: Any, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def gradient(self, parameter: Any) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    def moment(self, parameter: Any, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not any(self._adam.state.values()):
            return torch.zeros_like(parameter)
        self._link()
        return safe_get_full_optimizer_state(parameter, key)

    def set_moment(self, parameter: Any, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._link()
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def begin(self, steps: Tensor) -> None:
        super().begin(steps)
        self._zero._hp_optimizer_states_linked = False

    def _link(self) -> None:
        """Let DeepSpeed see Adam's moments of every parameter group.

        It (0.19) links them once, after the first group has stepped, when the others have no
        moments yet; so with two groups it must be told to link again.
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()


class PartedStates(WholeStates):
    """Of stage 3. DeepSpeed's own setters (0.19) fail where a part is filled up."""

    def _held(self) -> Iterator[Any]:
        yield from self._zero.fp32_partitioned_groups_flat

    def value(self, parameter: Any) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def set_value(self, parameter: Any, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        part = part_of(parameter, value)
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.copy_(part)
        if parameter.ds_status.name == "AVAILABLE":
            parameter.data.copy_(value)

    def gradient(self, parameter: Any) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    def moment(self, parameter: Any, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not any(self._adam.state.values()):
            return torch.zeros(parameter.ds_shape, device=parameter.device)
        return safe_get_full_optimizer_state(parameter, key)

    def set_moment(self, parameter: Any, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, part_of(parameter, value), key)


STATES: dict[int, type[WholeStates]] = {
    0: WholeStates,
    1: FlatStates,
    2: FlatStates,
    3: PartedStates,
}
"""By stage."""
