"""Training speed: our loop, PEFT with the Hugging Face Trainer, and a bare PyTorch loop.

    python benchmarks/train_throughput.py encoder --data /data/trec6
    python benchmarks/train_throughput.py decoder --data /data/gsm8k --device cuda --precision bf16

All sides train the same LoRA adapter (plan `none`: what PEFT can do too) of the same model on the
same rows, in processes of their own that take turns: a round is some steps of each, and ratios are
of one round, so that the machine's mood hits all alike. Loading, evaluation and saving are outside
the timed steps. Batches of the Trainer are as a user gets them: in random order, padded to their
longest row, `group_by_length` off as is its default; `bare, random order` has such batches too and
shows how much of the gain is ours by length buckets. A bare loop's batches are made beforehand, and
it doesn't look at its losses until the end: it is the limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training_sides import BARE, OURS, SIDES, TRAINER, Round, Setup, Told, run_side

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, dict[str, Any]] = {
    "encoder": {
        "model": "demo:minilm-l6",
        "task": {
            "kind": "text_classification",
            "data": "demo:vader",
            "max_length": 128,
            "validation_size": 64,
        },
        "targets": ["query", "value"],
        "batch_size": 16,
    },
    "decoder": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "task": {
            "kind": "sft",
            "data": "openai/gsm8k",
            "prompt_column": "question",
            "answer_column": "answer",
            "max_length": 512,
            "validation_size": 64,
        },
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "batch_size": 8,
    },
}
AIMS = {TRAINER: 1.2, BARE: 0.97}


def main() -> int:
    options = parse()
    sys.path.insert(0, str(ROOT))
    from e2lora.text_table import text_table

    names = [OURS, *(name for name in options.sides if name != OURS)]
    with tempfile.TemporaryDirectory() as folder:
        rounds, told = compete(names, setup_of(options, folder), options)
    print(text_table(*table(rounds, told[OURS].mfu), right=range(1, 9)))
    for name, aim in AIMS.items():
        if name in rounds:
            print(f"{OURS} to {name}: {ratio(rounds, name):.3f} (aim: at least {aim})")
    if BARE in told:
        apart = max(abs(a - b) for a, b in zip(told[OURS].losses, told[BARE].losses, strict=True))
        print(f"largest difference of a step's loss between {OURS} and {BARE}: {apart:.1e}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--model", help="another one than the setting's")
    parser.add_argument("--data", help="the setting's data as a local folder, or others")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each side in a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def setup_of(options: argparse.Namespace, folder: str) -> Setup:
    setting = SETTINGS[options.setting]
    task = dict(setting["task"])
    if options.data:
        task["data"] = options.data
        task.pop("subset", None)
    if options.max_length:
        task["max_length"] = options.max_length
    return Setup(
        model=options.model or setting["model"],
        task=task,
        targets=setting["targets"],
        batch_size=options.batch_size or setting["batch_size"],
        num_steps=options.warmup + options.rounds * options.steps,
        device=options.device,
        precision=options.precision,
        threads=options.threads,
        folder=folder,
    )


def compete(
    names: Sequence[str], setup: Setup, options: argparse.Namespace
) -> tuple[dict[str, list[Round]], dict[str, Told]]:
    """The rounds of each side, and what it says at the end. Each round begins with another side."""
    os.environ["OMP_NUM_THREADS"] = str(setup.threads)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=run_side, args=(name, setup, theirs), daemon=True).start()
        theirs.close()
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    for name in names:
        _turn(pipes[name], name, options.warmup)
    for number in range(options.rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            rounds[name].append(_turn(pipes[name], name, options.steps))
            took = rounds[name][-1]
            print(f"round {number + 1}: {name} {took.seconds:.1f} s", file=sys.stderr)
    return rounds, {name: _turn(pipes[name], name, 0) for name in names}


def _turn(pipe: Any, name: str, num_steps: int) -> Any:
    pipe.send(num_steps)
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"the process of {name!r} ended early; its error stands above") from None


def ratio(rounds: Mapping[str, Sequence[Round]], name: str) -> float:
    """How many times as many tokens (without padding) as ``name`` ours trains in a second."""
    return statistics.median(ratios(rounds, name, lambda r: r.seconds))


def ratios(
    rounds: Mapping[str, Sequence[Round]], name: str, cost: Callable[[Round], float]
) -> list[float]:
    """Ours to the other's tokens per cost, round by round."""
    return [
        (our.tokens / cost(our)) / (other.tokens / cost(other))
        for our, other in zip(rounds[OURS], rounds[name], strict=True)
    ]


def table(rounds: Mapping[str, Sequence[Round]], mfu: float) -> tuple[list[str], list[list[str]]]:
    head = ["side", "samples/s", "tokens/s", "padding", "CPU s/step", "peak memory"]
    head += [f"{OURS} is ×", "rounds", "by CPU time"] + (["MFU"] if mfu else [])
    rows = []
    for name, own in rounds.items():
        counts = [count for done in own for count in done.counts]
        padding = 1 - sum(c.tokens for c in counts) / sum(c.places for c in counts)
        rate = statistics.median(done.tokens / done.seconds for done in own)
        by_time = sorted(ratios(rounds, name, lambda r: r.seconds))
        by_cpu = statistics.median(ratios(rounds, name, lambda r: r.cpu_seconds))
        samples = (sum(c.rows for c in done.counts) / done.seconds for done in own)
        row = [
            name,
            f"{statistics.median(samples):.1f}",
            f"{rate:,.0f}",
            f"{padding:.1%}",
            f"{statistics.median(d.cpu_seconds / len(d.counts) for d in own):.3f}",
            f"{own[-1].memory / 2**30:.2f} GiB",
            f"{statistics.median(by_time):.3f}",
            f"{by_time[0]:.2f}–{by_time[-1]:.2f}",
            f"{by_cpu:.3f}",
        ]
        rows.append(row + ([f"{mfu * rate:.1%}"] if mfu else []))
    return head, rows


if __name__ == "__main__":
    sys.exit(main())
