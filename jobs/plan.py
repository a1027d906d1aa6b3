"""Which layers should share an adapter, and at what rank: measure once, look at several plans.

    python jobs/plan.py                                    # the quickstart's model and task
    python jobs/plan.py --plan e2 --plan e2_published --plan blocks block_size=2
    python jobs/plan.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --task sft data=openai/gsm8k subset=main prompt_column=question \\
        --targets q_proj k_proj v_proj o_proj --calibration num_samples=512 --dry-run

--plan: a preset (e2, e2_published, lss_only, hra_only, lora, all, matched) or a topology (none,
all, blocks, strided, random, matched, explicit, e2), then KEY=VALUE options; what is long may stand
in a file: groups=@groups.json. All options: docs/profile-and-plan.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--space",
        default="search_spaces.quickstart",
        help="module with `study`: model, task, targets, calibration and seed of its first point",
    )
    parser.add_argument(
        "--model", nargs="+", metavar="WORD", help="hub name, local folder or demo:NAME; KEY=VALUE"
    )
    parser.add_argument("--task", nargs="+", metavar="WORD", help="kind, then KEY=VALUE options")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="endings of linear modules")
    parser.add_argument("--calibration", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--plan",
        nargs="+",
        action="append",
        metavar="WORD",
        help="preset or topology, then KEY=VALUE options; may be repeated (default: e2)",
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--profile", type=Path, help="plan from this profile.json")
    parser.add_argument("--workers", type=int, default=1, help="of a Ray cluster, for the profile")
    parser.add_argument("--out", type=Path, help="folder (default: one below results/plans)")
    parser.add_argument("--dry-run", action="store_true", help="counts, memory and time only")
    options = parser.parse_args(arguments)
    for place in (str(ROOT), os.getcwd()):
        if place not in sys.path:
            sys.path.insert(0, place)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )  # for workers of a Ray that this process starts

    from e2lora.planning.entry import Words, plan_command

    words = Words(
        space=options.space,
        model=options.model,
        task=options.task,
        targets=options.targets,
        calibration=options.calibration,
        plans=options.plan,
        seed=options.seed,
        num_workers=options.workers,
    )
    return plan_command(words, options.profile, options.out, options.dry_run)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the command itself hears of it
        sys.exit(130)
