"""Check that a cluster can run a study, before it costs anything: each finding with its remedy.

    python jobs/doctor.py                                    # the quickstart, on this machine
    ray job submit --working-dir . -- python jobs/doctor.py --storage /shared/studies

Nodes and their versions, storage, GPUs, memory of the head, MLflow, models and data on every node.
Exit code 0: a study can run; 1: it can't. --stage brings weights from the hub to every node, once.
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
    parser.add_argument("--storage", type=Path, help="folder that all nodes share")
    parser.add_argument("--stage", action="store_true", help="fetch hub weights on every node")
    parser.add_argument("--may-grow", action="store_true", help="an autoscaler brings nodes")
    options = parser.parse_args(arguments)
    for place in (str(ROOT), os.getcwd()):
        if place not in sys.path:
            sys.path.insert(0, place)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )  # for workers of a Ray that this process starts

    from e2lora.checkup.entry import doctor_command

    return doctor_command(options.space, options.storage, options.stage, options.may_grow)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the command itself hears of it
        sys.exit(130)
