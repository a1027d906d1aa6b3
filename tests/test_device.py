"""What a device can't do is refused before anything is loaded; what it can is used right."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from e2lora.config import ModelConfig, TrainConfig
from e2lora.device import require_device_can
from e2lora.training.compiling import SWITCH, compiled
from e2lora.training.engine import Engine
from tests.kinds import KINDS, Adapted
from tests.toy import Toy, toy_batches

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MODEL = ModelConfig(name="demo:minilm-l6")
IDS = KINDS["llama"].inputs["input_ids"]


def training(**options: Any) -> TrainConfig:
    return TrainConfig(**{"max_steps": 6, "learning_rate": 1e-3, "global_batch_size": 3, **options})


# ---- what is refused --------------------------------------------------------------------------


def answer_of_accelerator(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    from e2lora.partitioned import import_deepspeed

    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    monkeypatch.setattr(kind, "is_fp16_supported", lambda self: supported)


def test_fp16_is_refused_where_the_device_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_of_accelerator(monkeypatch, False)
    with pytest.raises(ValueError, match=r"fp16 needs a device.*this CPU doesn't.*'bf16'"):
        require_device_can(training(precision="fp16"), MODEL, CPU)
    require_device_can(training(precision="bf16"), MODEL, CPU)
    answer_of_accelerator(monkeypatch, True)
    require_device_can(training(precision="fp16"), MODEL, CPU)


class Card:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")


def test_bf16_is_refused_on_a_gpu_that_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, (7, 5))
    with pytest.raises(ValueError, match=r"bf16.*8\.0 or more; Card has compute capability 7\.5"):
        require_device_can(training(precision="bf16"), MODEL, GPU)
    require_device_can(training(), MODEL, GPU)
    Card(monkeypatch, (8, 0))
    require_device_can(training(precision="bf16"), MODEL, GPU)


def test_worker_that_should_have_a_gpu_and_sees_none_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees none"):
        require_device_can(training(), MODEL, GPU)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2lora.device.shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"neither g\+\+ nor clang\+\+"):
        require_device_can(training(torch_compile=True), MODEL, CPU)


def test_quantisation_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2lora.quantized.find_spec", lambda name: None)
    model = MODEL.model_copy(update={"quantization": "nf4"})
    with pytest.raises(ValueError, match=r"e2lora\[qlora\]"):
        require_device_can(training(), model, CPU)


# ---- fp16 -------------------------------------------------------------------------------------

SCALE_THAT_OVERFLOWS = {"fp16": {"initial_scale_power": 24, "hysteresis": 1}}
SCALE_THAT_GROWS = {"fp16": {"initial_scale_power": 8, "loss_scale_window": 2}}


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes in float16, slowly, also where DeepSpeed says that it can't."""
    answer_of_accelerator(monkeypatch, True)


def start(**options: Any) -> tuple[Engine, Any]:
    adapted = Adapted("llama")
    return Engine(adapted.model, adapted.config, training(**options)), adapted


def step_of(engine: Engine, step: int) -> float:
    loss = engine.module(input_ids=IDS[:, : 7 - step % 3], labels=IDS[:, : 7 - step % 3]).loss
    engine.backward(loss.float())
    engine.micro_step(step)
    return float(loss.detach())


def scale_of(engine: Engine) -> float:
    return float(engine.gather()["loss_scale/cur_scale"])


@pytest.mark.usefixtures("one_process", "half")
@pytest.mark.parametrize("stage", [1, 2])
def test_step_that_overflows_is_skipped_and_the_next_ones_are_not(stage: int) -> None:
    engine, _ = start(precision="fp16", zero_stage=stage, deepspeed=SCALE_THAT_OVERFLOWS)
    before, skipped, losses = engine.gather(), [], []
    for step in range(12):
        losses.append(step_of(engine, step))
        skipped.append(engine.skipped)
        if all(skipped):
            now = engine.gather()
            same = (name for name in now if name.startswith("parameter/"))
            assert all(torch.equal(now[name], before[name]) for name in same)
            assert scale_of(engine) == 2.0 ** (24 - step - 1)
    engine.close()
    assert skipped[0]
    assert not any(skipped[skipped.index(False) :])
    assert all(loss < 100 for loss in losses)


@pytest.mark.usefixtures("one_process", "half")
@pytest.mark.parametrize("stage", [1, 2])
def test_training_in_fp16_is_near_that_in_float32_and_goes_on_from_a_checkpoint(
    stage: int,
) -> None:
    options = {"precision": "fp16", "zero_stage": stage, "deepspeed": SCALE_THAT_GROWS}
    plain, _ = start(zero_stage=stage)
    expected = [step_of(plain, step) for step in range(6)]
    plain.close()
    engine, _ = start(**options)
    losses = [step_of(engine, step) for step in range(3)]
    held, scale = engine.gather(), scale_of(engine)
    losses += [step_of(engine, step) for step in range(3, 6)]
    last = scale_of(engine)
    engine.close()
    assert losses == pytest.approx(expected, rel=0.01)
    assert 2.0**8 < scale < last
    resumed, _ = start(**options)
    resumed.restore(held)
    assert scale_of(resumed) == scale
    assert [step_of(resumed, step) for step in range(3, 6)] == losses[3:]
    assert scale_of(resumed) == last
    resumed.close()


@pytest.mark.usefixtures("one_process")
def test_only_fp16_has_a_loss_scale() -> None:
    engine, _ = start(zero_stage=1)
    assert not [name for name in engine.gather() if name.startswith("loss_scale/")]
    engine.close()


# ---- compiling --------------------------------------------------------------------------------


def curves(stage: int, backend: Any = "inductor") -> tuple[list[float], list[float]]:
    """Losses of a plain run and of a compiled one."""
    losses = []
    for compiles in (False, True):
        adapted = Adapted("llama")
        names = list(adapted.model.state_dict())
        with compiled(adapted.model, backend) if compiles else nullcontext():
            options = training(zero_stage=stage, torch_compile=compiles)
            engine = Engine(adapted.model, adapted.config, options)
            losses.append([step_of(engine, step) for step in range(4)])
            assert list(adapted.model.state_dict()) == names
            engine.close()
    return losses[0], losses[1]


def test_module_is_compiled_for_a_while_and_nothing_of_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SWITCH, "1")  # as DeepSpeed's start leaves it
    model, traced = Toy(), []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    batches = toy_batches(2, 3, 4)
    expected, names = [model(batch) for batch in batches], list(model.state_dict())
    with compiled(model, backend=backend):
        assert os.environ[SWITCH] == "1"
        assert list(model.state_dict()) == names
        for batch, value in zip(batches, expected, strict=True):
            torch.testing.assert_close(model(batch), value)
        assert len(traced) == 1, "one graph serves all lengths"
    torch.testing.assert_close(model(batches[0]), expected[0])
    assert len(traced) == 1
    assert model._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_model_trains_as_a_plain_one_at_every_length(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's tracing and without its code generation, which takes minutes."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv(SWITCH, "1")
    counters.clear()
    plain, other = curves(stage, "eager")
    assert other == pytest.approx(plain, rel=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3, "lengths share their graphs"
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_model_in_generated_code_trains_as_a_plain_one() -> None:
    plain, other = curves(1)
    assert other == pytest.approx(plain, rel=1e-4)
