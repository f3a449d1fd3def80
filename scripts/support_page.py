"""Write docs/support.md: take every MoE family of the installed transformers through the whole chain.

python scripts/support_page.py                 # all families, about two minutes
python scripts/support_page.py mixtral gpt_oss  # the rows of these alone, to look at
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from families.chain import ChainResult, run_chain
from families.discovery import contract_families, foreign_families
from families.fresh import FreshProcesses
from families.page import PAGE, page, row


def main(families: list[str]) -> None:
    """Print each family's row as it comes, and write the page if all families were asked for."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results: list[ChainResult] = []
    with FreshProcesses() as processes:
        for family in families or sorted([*contract_families(), *foreign_families()]):
            with tempfile.TemporaryDirectory() as folder:
                results.append(run_chain(family, Path(folder), processes))
            print(row(results[-1]), flush=True)
    if not families:
        PAGE.write_text(page(results), encoding="utf-8")
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
