"""Figure 1 (b) of arXiv 2502.14583: error against the number of samples."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulations import plotting

if __name__ == '__main__':
    plotting.command('n')()
