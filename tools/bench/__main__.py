"""Every table of this folder, or some of them.

python tools/bench [--quick] [TABLE ...] [--json FILE]

A table is a module beside this file with `run(quick) -> list[Row]`. The exit status is 1 where a figure misses its
bound.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib import import_module
from pathlib import Path

TABLES = ("loss", "attention", "optimizers", "overhead", "data_path", "startup")


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    given = parser.parse_args()
    unknown = sorted(set(given.tables) - set(TABLES))
    if unknown:
        parser.error(f"there is no table {', '.join(unknown)}; choose from {', '.join(TABLES)}")
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
