"""Heat map of the advantage of many sources over two parameters."""

import plotting  # of this folder

if __name__ == '__main__':
    plotting.command('grid')()
