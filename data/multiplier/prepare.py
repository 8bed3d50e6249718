"""Products of numbers of 1 and 2 digits, generated: `12*34=8040`, the result's last digit first.

python data/multiplier/prepare.py                 # data/multiplier, and data/multiplier/LENGTH with one length each
python data/multiplier/prepare.py --digits 4 --plain
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrate.data.arithmetic import MULTIPLIER, main  # noqa: E402
from orchestrate.data.prepare import run  # noqa: E402

if __name__ == "__main__":
    run(lambda: main(MULTIPLIER, __doc__, Path(__file__).parent, digits=2))
