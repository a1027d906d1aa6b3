"""FLOPs against torch's own counter, and what a step is said to have cost."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from e2lora.adapters import adapt
from e2lora.config import PlanConfig
from e2lora.plan import build_plan
from e2lora.targets import find_targets
from e2lora.training.meter import FlopsPerToken, Meter, memory_gib, peak_flops
from tests.kinds import LLAMA


def llama(hidden: int = 64, layers: int = 3) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).requires_grad_(False)


@pytest.mark.parametrize("trained", ["an adapter", "all weights"])
def test_flops_of_a_token_are_those_that_torch_counts(trained: str) -> None:
    model = llama()
    plan = build_plan(find_targets(model, LLAMA), PlanConfig(r=8))
    adapted = adapt(model, plan) if trained == "an adapter" else model.requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_()
    )
    ids = torch.randint(0, 128, (2, 24))
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=ids, use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops() / ids.numel()
    assert FlopsPerToken.of(adapted).at(mean_length=24) == pytest.approx(counted, rel=0.01)


def test_step_is_measured_from_the_end_of_the_one_before() -> None:
    meter = Meter(llama(), torch.device("cpu"), "fp32", num_workers=2)
    time.sleep(0.2)
    meter.restart()
    time.sleep(0.05)
    measured = meter.read(num_tokens=100, num_rows=4)
    assert 0.05 <= measured["seconds"] < 0.2
    assert measured["tokens_per_second"] == pytest.approx(100 / measured["seconds"])
    assert measured["tokens_per_second_per_worker"] == measured["tokens_per_second"] / 2
    assert "mfu" not in measured, "the peak of a CPU isn't known"
    held = torch.ones(2**26)  # 256 MiB
    assert meter.read(100, 4)["peak_memory_gib"] > measured["peak_memory_gib"] + 0.2
    del held
    assert memory_gib(torch.device("cpu")) > 0.05


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "fp16", 312e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", None),
        ("something new", "bf16", None),
    ],
)
def test_peak_is_told_where_it_is_known(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == peak


def test_mfu_is_the_share_of_the_peak_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr("e2lora.training.meter.peak_flops", lambda *_: 1e9)
    meter = Meter(model, torch.device("cpu"), "bf16", num_workers=4)
    measured = meter.read(num_tokens=240, num_rows=10)
    expected = 240 / measured["seconds"] * FlopsPerToken.of(model).at(24.0) / (4 * 1e9)
    assert measured["mfu"] == pytest.approx(expected)
