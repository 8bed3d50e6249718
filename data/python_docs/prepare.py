"""The demo's data set: the Python language reference that ships inside CPython, character level, no download.

    python data/python_docs/prepare.py

About 465,000 characters (it varies with the version of Python), the first 90 % for training.
"""

import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pydoc_data import topics  # noqa: E402

from orchestrate.data.prepare import options, parsed, prepared, run, write_whole  # noqa: E402


def main() -> None:
    given = parsed(options(__doc__, Path(__file__).parent))
    facts = {}
    if not given.input:
        text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        given.input = [given.out / "input.txt"]
        given.out.mkdir(parents=True, exist_ok=True)
        write_whole(given.input[0], text.encode("utf-8"))
        facts = {"source": f"pydoc_data of Python {platform.python_version()}", "licence": "PSF-2.0"}
    prepared(given, given.input, facts=facts)


if __name__ == "__main__":
    run(main)
