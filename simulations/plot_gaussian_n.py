"""Figure 1 (b) of arXiv 2502.14583: error against the number of samples."""

import plotting  # of this folder

if __name__ == '__main__':
    plotting.command('n')()
