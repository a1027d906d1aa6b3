"""Train one run: a point of a space, a recorded trial, or the best trial of a study.

    python jobs/train.py                                   # the quickstart's first point
    python jobs/train.py --set system=E²LoRA budget=73728 training.max_steps=500
    python jobs/train.py --from-study quickstart --best --workers 2 \\
        --set training.num_epochs=3
    python jobs/train.py --trial results/quickstart/trials/00008/trial.json

--set: names without a dot are what the space suggests; names with one are fields of the
configuration. The same command again resumes an interrupted run. All options: docs/training.md.
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
    parser.add_argument("--space", help="module with `study` (default: search_spaces.quickstart)")
    parser.add_argument("--trial", type=Path, metavar="FILE", help="a recorded trial.json")
    parser.add_argument("--from-study", metavar="NAME", help="a study below --storage")
    parser.add_argument(
        "--best", action="store_true", help="of --from-study: by its first objective (default)"
    )
    parser.add_argument("--trial-number", type=int, help="of --from-study: this one")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="sets"
    )
    parser.add_argument(
        "--workers", metavar="N|MIN:MAX", help="a range: it goes on with fewer when nodes are lost"
    )
    parser.add_argument("--name", help="of the run and its folder (default: from what it trains)")
    parser.add_argument("--storage", type=Path, help="folder that all nodes share")
    options = parser.parse_args(arguments)
    for place in (str(ROOT), os.getcwd()):
        if place not in sys.path:
            sys.path.insert(0, place)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )  # for workers of a Ray that this process starts

    from e2lora.single.entry import Words, train_command

    words = Words(
        space=options.space,
        trial=options.trial,
        study=options.from_study,
        best=options.best,
        number=options.trial_number,
        sets=options.sets,
        name=options.name,
        workers=options.workers,
        storage=options.storage,
    )
    return train_command(words)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the command itself hears of it
        sys.exit(130)
