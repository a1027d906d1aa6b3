"""How much of its slots' time a study spends in training: on resident groups, and without them.

    python benchmarks/utilisation.py
    python benchmarks/utilisation.py --steps 400 --trials 8 --own 2 --slots 2

Trials of some tens of seconds on a local Ray. One side is a pool as a study uses it, with one trial
waiting ahead; what it prints is what a study prints. The other does the same work in the same loop
in a `TorchTrainer` per trial, one after another, as Ray's documentation shows it. Utilisation is
time in training steps and evaluation over wall time x slots; the pool's includes its start-up, and
the line below leaves that out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:minilm-l6")
    parser.add_argument("--data", default="demo:vader")
    parser.add_argument("--targets", nargs="+", default=["query", "value"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--slots", type=int, default=1, help="CPUs of the local Ray")
    parser.add_argument("--trials", type=int, default=6, help="on resident groups")
    parser.add_argument("--own", type=int, default=1, help="with a TorchTrainer of their own")
    options = parser.parse_args()
    path = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    sys.path[:0] = path[:2]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    import ray
    from trial_overhead import LOG, Bench

    with tempfile.TemporaryDirectory() as folder:
        os.environ[LOG] = f"{folder}/times.jsonl"
        ray.init(
            address="local",
            num_cpus=options.slots,
            include_dashboard=False,
            log_to_driver=False,
        )
        made_of = (options.model, options.data, options.targets, options.steps)
        resident = on_resident_groups(Bench(Path(folder) / "pool", *made_of), options.trials)
        bench = Bench(Path(folder) / "own", *made_of)
        own = [bench.by_a_trainer_of_its_own() for _ in range(options.own)]
        ray.shutdown()
    ours = resident.share("steps") + resident.share("other")
    started = ours / (1 - resident.share("starting"))
    theirs = sum(trial.work for trial in own) / sum(t.ended - t.submitted for t in own)
    each = sum(resident.spent[part] for part in ("steps", "other")) / options.trials
    print(f"{options.trials} trials of {each:.0f} s on resident groups:\n  {resident.line()}")
    print(f"  without start-up: {started:.0%}")
    print(f"{options.own} of them with a TorchTrainer each: utilisation {theirs:.0%}")
    print(f"ratio: {ours / theirs:.2f}, without start-up {started / theirs:.2f}")
    return 0


def on_resident_groups(bench: Any, num_trials: int) -> Any:
    """The pool's :class:`~e2lora.utilisation.Utilisation` over so many trials."""
    from e2lora.config import GroupSpec
    from e2lora.pool import Pool
    from e2lora.records import TrialFolder

    jobs = [bench.job() for _ in range(num_trials)]
    config = TrialFolder(Path(jobs[0].payload["folder"])).config()
    kind = GroupSpec.of(config.training)
    began = time.monotonic()
    with Pool("utilisation", bench.folder / "ray") as pool:
        slots = pool.open_slots([kind])
        pool.warm(kind, slots)
        with ThreadPoolExecutor(slots + 1) as open_ones:
            list(open_ones.map(pool.run, jobs))
        wall = time.monotonic() - began
    return pool.utilisation(wall)


if __name__ == "__main__":
    sys.exit(main())
