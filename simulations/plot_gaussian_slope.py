"""Error against the number of samples on logarithmic axes, with the fitted slopes."""

import plotting  # of this folder

if __name__ == '__main__':
    plotting.command('slope')()
