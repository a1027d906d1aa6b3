"""Run or resume a study: compare sharing schemes, sizes and learning rates of LoRA adapters.

    python jobs/search.py                                 # the quickstart, on this machine
    ray job submit --working-dir . -- python jobs/search.py --storage /shared/studies

The same command with the same --study goes on where it was interrupted. All of it: docs/search.md.
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
    parser.add_argument("--space", default="search_spaces.quickstart", help="module with `study`")
    parser.add_argument("--study", help="its name; a known one is resumed (default: the space's)")
    parser.add_argument("--storage", type=Path, help="folder that all nodes share")
    parser.add_argument("--trials", type=int, help="how many the study shall hold in all")
    parser.add_argument(
        "--seeds", type=int, default=0, help="train the chosen configurations again over so many"
    )
    parser.add_argument("--dry-run", action="store_true", help="what it would cost; trains nothing")
    parser.add_argument("--max-hours", type=float, help="begin no trial after so many")
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="trials that crashed, were lost or lacked memory",
    )
    parser.add_argument("--sampler", help="tpe, nsga2, gp, random or grid (default: the study's)")
    parser.add_argument("--register", metavar="NAME", help="the winner, as a model in MLflow")
    parser.add_argument("--ledger", metavar="URL", help="a database for Optuna's trials")
    parser.add_argument("--isolated", action="store_true", help="each trial in fresh processes")
    parser.add_argument("--may-grow", action="store_true", help="an autoscaler brings nodes")
    options = parser.parse_args(arguments)
    for place in (str(ROOT), os.getcwd()):
        if place not in sys.path:
            sys.path.insert(0, place)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )  # for workers of a Ray that this process starts

    from e2lora.search.entry import Words, search_command

    return search_command(Words(**vars(options)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the command itself hears of it
        sys.exit(130)
