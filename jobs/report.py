"""Make the report of a study again, from its folder alone; also in mid-study.

It is written into STORAGE/STUDY/report, and what matters of it is printed.

python jobs/report.py results/quickstart
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="STORAGE/STUDY, as jobs/search.py printed it")
    options = parser.parse_args(arguments)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))

    from e2lora.records import StudyFolder
    from e2lora.report import render_report

    folder = options.folder.expanduser().resolve()
    try:
        report = render_report(StudyFolder(folder.parent, folder.name))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{report.table}\n\n{report.verdict}\n")
    print(f"report     {report.html}")
    print(f"in text    {report.markdown}")
    print(f"trials     {report.csv}")
    print(f"pictures   {', '.join(file.name for file in report.pictures) or 'none yet'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
