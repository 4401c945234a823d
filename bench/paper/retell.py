"""Write findings and sections anew, from the figures of results that are there.

    python -m bench.paper.retell bench/results/paper-*.json

For when the words change; no figure does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.json_files import write_json
from bench.paper import bibtex_report, cost, denoise_report, flow_report

TELLERS = {
    "bibtex": bibtex_report.tell,
    "cost": cost.tell,
    "denoise": denoise_report.tell,
    "flow": flow_report.tell,
}


def retell(path: Path) -> None:
    """Replace "readme", and "finding" where there is one, in a result."""
    result = json.loads(path.read_text())
    result |= TELLERS[result["experiment"]](result)
    write_json(path, result)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper.retell", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args().results:
        retell(path)


if __name__ == "__main__":
    main()
