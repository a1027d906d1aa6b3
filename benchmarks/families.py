"""Every system trained for a short while on real weights and data: does each one learn?

    python benchmarks/families.py                          # all, at their recommended rates
    python benchmarks/families.py --only VeRA --rates 0.3 1 3

One seed, one machine, equal steps: the table shows that each system's loss falls, at which
learning rate, with how many parameters and bytes. It is no comparison of the systems: that is what
a study is for (`jobs/search.py`). Exits with 1 if a loss does not fall clearly.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CLEARLY = 0.05
"""By how much the mean loss of the last fifth of all steps must fall from the first tenth."""


class System(NamedTuple):
    plan: dict[str, Any]
    adapter: dict[str, Any]
    learning_rate: float


E2 = {"topology": "e2"}
LSS = {"topology": "e2", "allocation": "uniform"}
# LoRA's learning rate is that of the quickstart. Others were chosen among four, a factor of about 3
# apart, on this model and task at 100 steps: a factor of 10 more lets most of them learn nothing.
SYSTEMS = {
    "LoRA": System({}, {}, 3e-3),
    "all-shared": System({"topology": "all"}, {}, 3e-3),
    "blocks(2)": System({"topology": "blocks", "block_size": 2}, {}, 3e-3),
    "ShareLoRA-A": System({}, {"a_scope": "type"}, 3e-3),
    "ShareLoRA-B": System({}, {"b_scope": "type"}, 3e-3),
    "ShareLoRA-AB": System({}, {"a_scope": "type", "b_scope": "type"}, 3e-3),
    "E²LoRA": System(E2, {}, 3e-3),
    "E²ShareLoRA": System(E2, {"a_scope": "type"}, 3e-3),
    "DoRA": System({}, {"family": "dora"}, 3e-3),
    "E²DoRA": System(E2, {"family": "dora"}, 3e-3),
    "LoRA+": System({}, {"family": "lora_plus"}, 5e-4),
    "E²LoRA+": System(E2, {"family": "lora_plus"}, 5e-4),
    "LoRA-FA": System({}, {"family": "lora_fa"}, 1e-2),
    "E²LoRA-FA": System(E2, {"family": "lora_fa"}, 1e-2),
    "LoRI-D": System({}, {"family": "lori"}, 1e-2),
    "LoRI-S": System({}, {"family": "lori", "lori": {"mask_after": 30}}, 1e-2),
    "E²LoRI-D": System(E2, {"family": "lori"}, 1e-2),
    "VeRA": System({"r": 64}, {"family": "vera"}, 1e-1),
    "E²VeRA": System({**E2, "r": 64}, {"family": "vera"}, 1e-1),
    "RandLoRA": System({"r": 32, "lora_alpha": 640}, {"family": "randlora"}, 1e-3),
    "LSS only RandLoRA": System({**LSS, "r": 32, "lora_alpha": 640}, {"family": "randlora"}, 1e-3),
    "AdaLoRA": System({}, {"family": "adalora"}, 3e-2),
    "LSS only AdaLoRA": System(LSS, {"family": "adalora"}, 3e-2),
    "LoRA-GA": System({}, {"family": "lora_ga"}, 1e-3),
    "E²LoRA-GA": System(E2, {"family": "lora_ga"}, 1e-3),
    "RaSA": System({"r": 16, "lora_alpha": 8}, {"family": "rasa"}, 3e-3),  # k is 2
    "E²RaSA": System({**E2, "r": 16, "lora_alpha": 8}, {"family": "rasa"}, 3e-3),
    "HydraLoRA": System({"r": 4, "lora_alpha": 32}, {"family": "hydralora"}, 3e-3),  # three heads
    "E²HydraLoRA": System({**E2, "r": 4, "lora_alpha": 32}, {"family": "hydralora"}, 3e-3),
    "GoRA": System({}, {"family": "gora"}, 3e-4),
    "LSS only GoRA": System(LSS, {"family": "gora"}, 3e-4),
    "IncreLoRA": System({}, {"family": "increlora"}, 3e-2),
    "LSS only IncreLoRA": System(LSS, {"family": "increlora"}, 3e-2),
    "BSLoRA": System({"r": 2, "lora_alpha": 4}, {"family": "bslora"}, 3e-3),  # 4 and 16 are shared
    "E²BSLoRA": System({**E2, "r": 2, "lora_alpha": 4}, {"family": "bslora"}, 3e-3),
    "RaLoRA": System({}, {"family": "ralora"}, 3e-3),
    "LSS only RaLoRA": System(LSS, {"family": "ralora"}, 3e-3),
    "LoRA (pissa)": System({}, {"init_lora_weights": "pissa"}, 1e-3),
    "LoRA (olora)": System({}, {"init_lora_weights": "olora"}, 1e-3),
    "LoRA (orthogonal)": System({}, {"init_lora_weights": "orthogonal"}, 3e-3),
    "FFT": System({}, {"family": "full"}, 1e-4),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:minilm-l6")
    parser.add_argument("--data", default="demo:vader")
    parser.add_argument("--targets", nargs="+", default=["query", "value"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0], help="times recommended")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("LOCAL_RANK", "0")

    import torch

    from e2lora.text_table import text_table

    head = ["system", "learning rate", "adapter", "loss at first", "at last", "accuracy", "stored"]
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        bench = Bench(options.model, options.data, options.targets, options.steps, Path(folder))
        for number, name in enumerate(options.only):
            for factor in options.rates:
                began = time.monotonic()
                row, falls = bench.train(name, factor)
                rows.append(row)
                failed += [] if falls else [f"{name} at {row[1]}"]
                left = len(options.only) - number - 1
                print(
                    f"{' '.join(row)} ({time.monotonic() - began:.0f} s, {left} to go)",
                    file=sys.stderr,
                )
        torch.distributed.destroy_process_group()
    print(text_table(head, rows, right=(1, 2, 3, 4, 5, 6)))
    if failed:
        print(f"\nloss did not fall by {CLEARLY}: {', '.join(failed)}")
    return 1 if failed else 0


class Bench:
    """Trains one system after another on one model and task; profiles are measured once."""

    def __init__(self, model: str, data: str, targets: list[str], steps: int, folder: Path) -> None:
        self.model, self.data, self.targets = model, data, targets
        self.steps, self.folder, self.trials = steps, folder, 0
        self.base: Any = None
        self.profiles: dict[str, Any] = {}

    def train(self, name: str, factor: float) -> tuple[list[str], bool]:
        """A row of the table, and whether the loss fell clearly."""
        import torch

        from e2lora.adapters import FAMILIES
        from e2lora.config import (
            AdapterConfig,
            ModelConfig,
            PlanConfig,
            TextClassificationConfig,
            TrainConfig,
            TrialConfig,
        )
        from e2lora.models import load_base
        from e2lora.plan import build_plan
        from e2lora.profile import measure_profile
        from e2lora.records import TrialFolder
        from e2lora.targets import find_targets
        from e2lora.tasks import TrialData, load_task
        from e2lora.training import Reports, run_trial

        system = SYSTEMS[name]
        adapter = {"target_modules": self.targets, **system.adapter}
        if adapter.get("family") == "full":
            adapter["target_modules"] = []
        config = TrialConfig(
            model=ModelConfig(name=self.model),
            task=TextClassificationConfig(data=self.data, validation_size=1000, max_length=64),
            adapter=AdapterConfig.model_validate_json(_json(adapter)),
            plan=PlanConfig(**{"r": 8, "lora_alpha": 16, **system.plan}),
            training=TrainConfig(
                max_steps=self.steps,
                learning_rate=system.learning_rate * factor,
                head_learning_rate=3e-3,
                warmup_steps=self.steps // 10,
            ),
        )
        if self.base is None:
            task = load_task(config.task)
            self.base = load_base(config.model, task.auto_class, task.num_labels, torch.float32)
            rows = (task.features(s, self.base.processor) for s in ("train", "validation"))
            self.rows = TrialData(task, *rows)
        targets = find_targets(self.base.model, config.adapter.target_modules)
        profile = None
        if config.plan.needs_profile:
            key = config.plan.calibration.fingerprint()
            if key not in self.profiles:
                self.profiles[key] = measure_profile(self.base, self.rows, config)
            profile = self.profiles[key]
        plan = build_plan(targets, config.plan, profile)
        place = TrialFolder(self.folder / f"{self.trials:05d}")
        self.trials += 1
        trained = run_trial(self.base, self.rows, plan, config, place, Reports())
        if FAMILIES[config.adapter.family].touches_base(config.adapter):
            self.base = None
        losses, span = trained.losses, self.steps // 5
        first, last = _mean(losses[: span // 2]), _mean(losses[-span:])
        row = [
            config.system,
            f"{config.training.learning_rate:.2g}",
            f"{trained.adapter_parameters:,}",
            f"{first:.3f}",
            f"{last:.3f}",
            f"{trained.evaluations[-1].metrics['accuracy']:.3f}",
            f"{(place.adapter / 'adapter.safetensors').stat().st_size / 1024:,.0f} KiB",
        ]
        return row, last < first - CLEARLY


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _json(value: Any) -> str:
    import json

    return json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
