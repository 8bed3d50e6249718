"""Sums of numbers of 1 to 3 digits, generated: `012+345=7530`, the result's last digit first.

python data/adder/prepare.py                 # data/adder, and data/adder/LENGTH with one length each
python data/adder/prepare.py --digits 4 --plain
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.arithmetic import ADDER, main  # noqa: E402
from orchestrate.data.prepare import run  # noqa: E402

if __name__ == "__main__":
    run(lambda: main(ADDER, __doc__, Path(__file__).parent, digits=3))
