"""Heat map of the advantage of many sources over two parameters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulations import plotting

if __name__ == '__main__':
    plotting.command('grid')()
