"""Every table of this folder, or some of them.

python tools/bench [--quick] [TABLE ...] [--json FILE]

A table is a module beside this file with `run(quick) -> list[Row]`. The exit status is 1 where a figure misses its
bound. Some take minutes and are only run by name.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import import_module
from pathlib import Path

TABLES = (
    "train",
    "gpu",
    "overhead",
    "loss",
    "attention",
    "optimizers",
    "data_path",
    "startup",
    "previews",
    "preview_load",
    "parity",
)

BY_NAME = ("soak",)

HELPERS = Path(__file__).parents[2] / "tests" / "helpers"
"""The tests' fake engine, stock client and proxy."""


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*TABLES, *BY_NAME)
    words = f"of {', '.join(known)} (default: all but {', '.join(BY_NAME)})"
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=words)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    given = parser.parse_args()
    unknown = sorted(set(given.tables) - set(known))
    if unknown:
        parser.error(f"there is no table {', '.join(unknown)}; choose from {', '.join(known)}")
    sys.path.append(str(HELPERS))
    found, missed = {}, False
    for name in given.tables or TABLES:
        print(f"{name}", flush=True)
        rows = import_module(name).run(given.quick)
        for row in rows:
            print(f"  {row.as_line()}", flush=True)
        found[name] = [row.as_dict() for row in rows]
        missed |= not all(row.holds for row in rows)
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": platform.platform(), "tables": found}, indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
