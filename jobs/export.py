"""Make of a trained adapter what other programs read: PEFT, vLLM, llama.cpp, transformers.

python jobs/export.py results/quickstart/trials/00008/adapter --form portable --out my-lora

--form peft      a PEFT adapter: PeftModel.from_pretrained
--form portable  plain LoRA of one rank, for readers that know nothing of rank_pattern
--form merged    the model with the adapter merged into its weights: from_pretrained
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
    parser.add_argument("folder", type=Path, help="the `adapter` folder of a trial")
    parser.add_argument("--form", required=True, choices=("peft", "portable", "merged"))
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", help="base model: local folder or hub name (default: recorded)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the merged model (default: the base's). Rounding to bfloat16 may lose a part of "
        "what the adapter does; how much is told",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="don't load it again to compare its outputs"
    )
    options = parser.parse_args(arguments)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))

    from e2lora.command import run_for_user

    return run_for_user(lambda: _export(options), "nothing was written")


def _export(options: argparse.Namespace) -> int:
    from e2lora.adapters.export import export_adapter
    from e2lora.text_table import text_table

    folder, out = (path.expanduser().resolve() for path in (options.folder, options.out))
    done = export_adapter(
        folder, options.form, out, options.model, not options.no_verify, options.dtype
    )
    rows = [[name, f"{size:,}"] for name, size in done.files.items()]
    print(text_table(["file", "bytes"], rows, right=(1,)))
    if compared := done.comparison:
        changes = {"adapter − base": compared.effect, "export − adapter": compared.difference}
        rows = [
            [name, f"{change.largest:.2g}", f"{change.root_mean_square:.2g}"]
            for name, change in changes.items()
        ]
        print(text_table(["outputs on a random batch", "max |Δ|", "rms"], rows, right=(1, 2)))
    told = f"{compared.lost:.2g} of the adapter's effect lost" if compared else "not compared"
    print(f"{done.form}: {done.parameters:,} parameters, {told}, in {done.folder}")
    for warning in done.warnings:
        print(f"warning: {warning}.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
