"""What measuring gradients costs: the probe against what it is put into, and what it replaces.

    python benchmarks/profile_cost.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Three ways through the same batch of random tokens, by turns in one process:

* plain: forward and backward with frozen weights (gradients of activations only);
* autograd: forward and backward with gradients of the target weights, and their σ;
* probe: `measure_gradients`, one microbatch, frozen weights; also with 4 folds.

Printed are medians, their ratios to plain, and the peak memory of each in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def ways_of(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    from e2lora.gradients import Microbatch, Probing, Round, measure_gradients
    from e2lora.targets import find_targets

    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto_class = AutoModel if options.headless else AutoModelForCausalLM
    model = auto_class.from_pretrained(options.model, dtype=torch.float32).to(device)
    model.requires_grad_(False).eval()
    targets = find_targets(model, TARGETS)
    shape = (options.rows, options.tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)
    supervised = options.rows * (options.tokens - 1)

    def loss_sum(model: Any, ids: Any) -> Any:
        if options.headless:
            return model(input_ids=ids, use_cache=False).last_hidden_state.square().sum()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")

    embeddings = model.get_input_embeddings()

    def plain() -> None:
        handle = embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_())
        (loss_sum(model, ids) / supervised).backward()
        handle.remove()

    def autograd() -> list[float]:
        weights = [model.get_submodule(t.path).weight for t in targets]
        for weight in weights:
            weight.requires_grad_(True)
        (loss_sum(model, ids) / supervised).backward()
        stds = [weight.grad.double().std(correction=0).item() for weight in weights]
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)
        return stds

    def probe(folds: int = 1) -> list[float]:
        each = options.rows // folds
        rounds = [Round(tuple(range(folds)), (Microbatch(ids, (each,) * folds),))]
        counts = [each] * folds
        per_fold = [supervised // folds] * folds
        found = measure_gradients(
            model, targets, rounds, loss_sum, counts, per_fold, Probing(), None
        )
        assert found.method == "blocks"
        return [entry.moments.std for entry in found.layers]

    return {
        "plain": plain,
        "autograd": autograd,
        "probe": probe,
        "probe, 4 folds": lambda: probe(4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--headless", action="store_true", help="without logits, whose memory hides the probe's"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from e2lora.text_table import text_table

    ways = ways_of(options)
    if options.peak_of:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was of loading
        before = _status_mib("VmRSS")
        ways[options.peak_of]()
        print(f"{_status_mib('VmHWM') - before:.1f}")
        return 0

    stds = {name: way() for name, way in ways.items()}  # also warms up
    error = max(abs(a / b - 1) for a, b in zip(stds["probe"], stds["autograd"], strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    peaks = {name: float(_run_alone(name)) for name in ways}
    rows = []
    for name in ways:
        ratios = [t / p for t, p in zip(seconds[name], seconds["plain"], strict=True)]
        rows.append(
            [
                name,
                f"{statistics.median(seconds[name]):.2f} s",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f}–{max(ratios):.3f}",
                f"{peaks[name]:.0f} MiB",
                f"{peaks[name] / peaks['plain']:.3f}",
                f"{peaks[name] - peaks['plain']:+.0f} MiB",
            ]
        )
    head = ["way", "time", "ratio", "range", "peak above the model", "ratio", "more than plain"]
    print(f"{options.model}: {options.rows} x {options.tokens} tokens, targets {TARGETS}")
    print(text_table(head, rows, right=range(1, 7)))
    print(f"largest relative difference of a σ, probe to autograd: {error:.1e}")
    return 0


def _run_alone(name: str) -> str:
    command = [sys.executable, *sys.argv, "--peak-of", name]
    steady = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"}  # what is freed is given back
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=steady)
    return done.stdout.split()[-1]


def _status_mib(field: str) -> float:
    """VmRSS, what this process holds now, or VmHWM, the most it held (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    sys.exit(main())
