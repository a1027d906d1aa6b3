"""Which reading of the budget gives the parameter counts that were published for E²LoRA?

    python benchmarks/published_counts.py

Llama-3.1-8B shapes (q, k, v, o), no weights: made-up entropies over depth, and partitions drawn at
random, since the published ones aren't known. Each cell is the median over 30 draws, in millions
of trainable parameters, with the range. What was published: layer sharing alone 3.51, rank
allocation alone 6.82, both 3.61, both at r = 16 7.22, E²ShareLoRA 1.59 (LoRA: 6.82).
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUM_LAYERS, NUM_DRAWS = 32, 30
SHAPES = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024, "o_proj": 4096}  # out; in is 4096
DEPTH: dict[str, Callable[[float], float]] = {  # entropy over depth 0 … 1, in nats
    "flat": lambda x: -7.0,
    "falling by 2": lambda x: -6.0 - 2.0 * x,
    "a hump of 2": lambda x: -8.0 + 2.0 * math.exp(-(((x - 0.5) / 0.2) ** 2)),
}


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from e2lora.adapters import count_adapter_parameters
    from e2lora.config import AdapterConfig, PlanConfig
    from e2lora.moments import (
        HALF_LOG_2PI_E,
        GradientProfile,
        LayerGradient,
        Moments,
        Provenance,
        Target,
    )
    from e2lora.plan import build_plan
    from e2lora.text_table import text_table

    targets = [
        Target(
            path=f"model.layers.{layer}.self_attn.{name}",
            module_type=f"model.layers.*.self_attn.{name}",
            layer=layer,
            in_features=4096,
            out_features=out,
        )
        for layer in range(NUM_LAYERS)
        for name, out in SHAPES.items()
    ]

    def profile_of(entropy: Callable[[float], float], noise: random.Random) -> GradientProfile:
        """Entropies over depth, each layer's off by 0.3 nats or so: real ones aren't smooth."""
        layers = []
        for t in targets:
            value = entropy(t.layer / (NUM_LAYERS - 1)) + noise.gauss(0.0, 0.3)
            std = math.exp(value - HALF_LOG_2PI_E)
            moments = Moments(
                count=t.in_features * t.out_features, mean=0.0, std=std, mean_abs=0.8 * std
            )
            layers.append(LayerGradient(target=t, moments=moments))
        return GradientProfile(
            layers=tuple(layers),
            provenance=Provenance(
                model="made up",
                model_fingerprint="",
                task="none",
                num_samples=1,
                num_supervised=1,
                seed=0,
                dtype="float32",
                mean_loss=0.0,
                method="blocks",
                num_workers=1,
                versions={},
            ),
        )

    lora = AdapterConfig(target_modules=tuple(SHAPES))
    shared_a = AdapterConfig(target_modules=tuple(SHAPES), a_scope="type")
    columns = {
        "LSS only": ({"allocation": "uniform"}, lora),
        "layer": ({"budget": "layer"}, lora),
        "layer, r=16": ({"budget": "layer", "r": 16}, lora),
        "interval": ({"budget": "interval"}, lora),
        "parameter": ({"budget": "parameter"}, lora),
        "shared A, layer": ({"budget": "layer"}, shared_a),
    }
    rows = []
    for num_intervals in (9, 12, 16, 17, 20):
        for name, entropy in DEPTH.items():
            counts: dict[str, list[float]] = {column: [] for column in columns}
            for draw in range(NUM_DRAWS):
                profile = profile_of(entropy, random.Random(draw))
                for column, (given, adapter) in columns.items():
                    chosen = {
                        "topology": "random",
                        "num_intervals": num_intervals,
                        "partition_seed": draw,
                        "allocation": "entropy_power",
                        **given,
                    }
                    plan = build_plan(targets, PlanConfig(**chosen), profile)
                    counts[column].append(count_adapter_parameters(plan, adapter) / 1e6)
            rows.append([str(num_intervals), name, *(_cell(counts[column]) for column in columns)])
    print(text_table(["intervals", "entropies", *columns], rows, right=range(2, 8)))
    alone = build_plan(
        targets,
        PlanConfig(topology="none", allocation="entropy_power"),
        profile_of(DEPTH["a hump of 2"], random.Random(0)),
    )
    print(f"rank allocation alone: {alone.parameters / 1e6:.2f} under each budget and entropies")
    return 0


def _cell(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    middle = f"{statistics.median(values):.2f}"
    return middle if low == high else f"{middle} ({low}–{high})"


if __name__ == "__main__":
    sys.exit(main())
