"""Figure 1 (c) of arXiv 2502.14583: error against the similarity of the sources."""

import plotting  # of this folder

if __name__ == '__main__':
    plotting.command('sim')()
