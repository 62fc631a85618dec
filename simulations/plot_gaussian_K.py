"""Figure 1 (a) of arXiv 2502.14583: error against the number of sources."""

import plotting  # of this folder

if __name__ == '__main__':
    plotting.command('K')()
