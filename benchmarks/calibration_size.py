"""How many calibration rows a plan needs: agreement of E² plans between disjoint samples, by size.

    python benchmarks/calibration_size.py                        # the quickstart's model and task
    python benchmarks/calibration_size.py --sizes 16 64 256 --model FOLDER \\
        --task sft data=openai/gsm8k subset=main prompt_column=question \\
        --targets q_proj k_proj v_proj o_proj

For each size n, 4 n rows are measured in 4 folds. Four plans of n rows each are then compared: by
the mean Jaccard index of their cuts, beside what chance would give, and by the mean difference of
a layer's rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUM_FOLDS = 4


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--space", default="search_spaces.quickstart")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--task", nargs="+")
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 64, 256, 1024])
    parser.add_argument("--microbatch-size", type=int, default=16)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))

    from e2lora.moments import GradientProfile
    from e2lora.plan import SharingPlan
    from e2lora.planning import make_plans, title_of
    from e2lora.planning.entry import Words, request_of
    from e2lora.text_table import text_table

    rows = []
    for size in options.sizes:
        words = [f"num_samples={NUM_FOLDS * size}", f"num_folds={NUM_FOLDS}"]
        words.append(f"microbatch_size={options.microbatch_size}")
        request = request_of(
            Words(options.space, options.model, options.task, options.targets, words)
        )
        with tempfile.TemporaryDirectory() as folder:
            make_plans(request, Path(folder))
            profile_text = (Path(folder) / "profile.json").read_text()
            plan = SharingPlan.model_validate_json((Path(folder) / "plan.json").read_text())
        profile, found = GradientProfile.model_validate_json(profile_text), plan.stability
        assert found is not None  # there are folds
        measured = profile.provenance
        title = title_of(measured.model, measured.task)
        rows.append(
            [
                str(size),
                f"{measured.num_supervised // NUM_FOLDS:,}",
                f"{found.jaccard:.2f}",
                f"{found.chance:.2f}",
                f"{found.rank_difference:.2f}",
                str(len(plan.groups)),
            ]
        )
        print(f"{title}: {size} rows a fold: {found.verdict}", flush=True)
    head = ["rows", "supervised", "Jaccard", "by chance", "mean |Δr|", "groups of all 4 n rows"]
    print(text_table(head, rows, right=range(6)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
