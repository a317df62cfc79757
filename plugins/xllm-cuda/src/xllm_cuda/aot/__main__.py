"""Compile every kernel for every chip, and print the table or write it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from xllm_cuda.aot.table import CHIPS, build, render


def main() -> int:
    """Exit status 1 if a hot kernel spills."""
    parser = argparse.ArgumentParser(prog="python -m xllm_cuda.aot", description=__doc__)
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write DIR/aot.json and DIR/AOT.md instead of printing"
    )
    parser.add_argument("--model", action="append", default=[], help="only the shapes of this model; repeatable")
    parser.add_argument(
        "--workload", action="append", default=[], help="only this work, as the table names it; repeatable"
    )
    parser.add_argument(
        "--capability",
        type=int,
        action="append",
        choices=[chip.capability for chip in CHIPS],
        help="only this chip; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, which makes kernels into Python functions; unset it")
    table = build(
        args.capability or [chip.capability for chip in CHIPS], models=args.model, workload_names=args.workload
    )
    if args.write is not None:
        (args.write / "aot.json").write_text(table.to_json(), encoding="utf-8")
        (args.write / "AOT.md").write_text(render(table), encoding="utf-8")
    else:
        print(table.to_json() if args.json else render(table))
    spills = table.spills()
    for line in spills:
        print(line, file=sys.stderr)
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
