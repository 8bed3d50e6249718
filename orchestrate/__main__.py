"""python -m orchestrate: the same as the installed command."""

import sys

from orchestrate.tools.main import command

if __name__ == "__main__":
    sys.exit(command())
