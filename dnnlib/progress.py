"""Progress of everything that takes more than a few seconds: a bar on a terminal, else a line a
minute, which log files keep."""

import sys

import tqdm

SILENT = 2        # seconds before a bar is shown
LINE_SECONDS = 60  # between lines


class _Lines(tqdm.tqdm):
    """A line in place of each redrawing; the last one too, if there was another."""

    @staticmethod
    def status_printer(file):
        def write(text: str):
            if text.strip():
                file.write(f'{text.strip()}\n')
                file.flush()

        return write

    def clear(self, nolock=False):
        """Lines stay."""

    def refresh(self, nolock=False, lock_args=None):
        if not nolock:                                         # else behind each `tqdm.write`
            super().refresh(lock_args=lock_args)

    def close(self):
        if self.disable:
            return
        shown = self.last_print_t >= self.start_t + self.delay
        self.leave = False
        if shown:
            self.display(pos=0)
        self.disable = True
        self._decr_instances(self)


def bar(iterable=None, show: bool = True, **options) -> tqdm.tqdm:
    """tqdm's bar over an iterable, or for `update` calls; `options` are tqdm's.

    show  False on all processes but the first
    """
    if not show:
        return tqdm.tqdm(iterable, **options, disable=True)
    if getattr(sys.stderr, 'isatty', bool)():
        return tqdm.tqdm(iterable, **{'delay': SILENT} | options)
    # tqdm's thread, which looks after slow bars, needs longer intervals than theirs.
    line = dict(delay=LINE_SECONDS, mininterval=LINE_SECONDS, maxinterval=2 * LINE_SECONDS,
                miniters=1, ascii=True, ncols=100)
    return _Lines(iterable, **options | line)
