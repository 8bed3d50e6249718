"""Generate text from a run folder or other weights: `python sample.py --help` (tools/sample.py)."""

import sys

from orchestrate.tools.main import script

if __name__ == "__main__":
    script("sample", sys.argv[1:])  # listens for signals before it imports what takes seconds

from orchestrate.tools.sample import main

__all__ = ["main"]
