"""Do generated images help? Classifiers trained on real images alone, with generated and with
selected ones."""

import dataclasses
import itertools
import os
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from dnnlib import UserError, cli, lazy, options, progress, util

with lazy.imports(__name__ == '__main__'):
    import pandas as pd

    from torch_utils import distributed as dist
    from torch_utils import parallel
    from training import runs

import studies
from metrics.shares import percent
from synthetic_data import train_classifier

DATA = {'real': 'real', 'generated': 'real + generated', 'selected': 'real + selected'}
TRAINING = ('plain', 'adversarial')
MEASURES = {'clean': 'clean', 'robust': 'under attack'}
# Settings that change no result.
REPORTING = ('status', 'checkpoint', 'snapshot', 'bench', 'shard')


@dataclasses.dataclass(frozen=True)
class Run:
    """One classifier to train: its folder and all of its settings."""

    folder: str
    data: str
    training: str
    seed: int
    config: dict
    fingerprint: str | None = None     # of the training images, if they are compared

    @property
    def accuracy(self) -> dict | None:
        """The row of accuracy.json at the end of the run; None if it has not come to its end.

        Raises UserError if the folder is of a run with other settings.
        """
        rows = train_classifier.read_accuracy(self.folder)
        if not rows or rows[-1]['nimg'] < self.config['duration']:
            return None
        deciding = {key: value for key, value in self.config.items() if key not in REPORTING}
        record = runs.read_options(self.folder)
        images = record.get('dataset', {}).get('fingerprint')
        if images and self.fingerprint:
            record['set of images'] = images
            deciding['set of images'] = self.fingerprint
        util.require_same(self.folder, record, util.finite(deciding), 'choose another folder')
        return rows[-1]

    def train(self):
        """Trains it to its end. Raises KeyboardInterrupt if it is told to stop; then it goes on
        from a checkpoint."""
        with studies.silence():
            complete = train_classifier.train(self.config, self.folder)
        if not complete:
            raise KeyboardInterrupt


def plan(outdir: str, data: str, test: str, sources: dict, trainings, seeds,
         options: dict) -> list[Run]:
    """The runs, which differ in data, training and seed alone, the long ones first.

    `sources` {'real': None, 'generated': path, ...}; `options` of train_classifier.py.
    """
    shared = options | dict(data=data, test=test, robust=True, test_every=0,
                            snapshot=options['duration'])
    planned = []
    for training, seed, name in itertools.product(sorted(trainings), seeds, sources):
        config = train_classifier.build_config(shared | dict(
            generated=sources[name], adversarial=training == 'adversarial', seed=seed))
        folder = os.path.join(outdir, f'{name}-{training}-seed{seed}')
        planned.append(Run(folder, name, training, seed, config))
    return planned


def train_all(planned: list[Run], jobs: int):
    """Trains what has not come to its end."""
    waiting = [run for run in planned if run.accuracy is None]
    if finished := len(planned) - len(waiting):
        dist.print0(f'{finished} of {len(planned)} classifiers are trained already')
    trained = parallel.run_side_by_side(Run.train, waiting, jobs)
    for run in progress.bar(trained, dist.get_rank() == 0, total=len(waiting),
                            unit='classifier'):
        accuracy = dist.broadcast_object(run.accuracy)
        dist.print0(f'{run.training}, {DATA[run.data]}, seed {run.seed}: '
                    f'clean {percent(accuracy, "clean")}, under attack '
                    f'{percent(accuracy, "robust")}')


def table(planned: list[Run]) -> pd.DataFrame:
    """A row for each run: training, data, seed, clean and robust accuracy."""
    rows = [dict(training=run.training, data=run.data, seed=run.seed) | run.accuracy
            for run in planned]
    return pd.DataFrame(rows).drop(columns='nimg')


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, and their standard errors; gains are the mean differences to real data
    alone at the same seed."""
    values = results.set_index(['training', 'data', 'seed'])[list(MEASURES)]
    alone = values.xs('real', level='data').reindex(values.index.droplevel('data'))
    gains = (values - alone.to_numpy()).add_suffix(' gain')
    groups = values.join(gains).groupby(level=['training', 'data'])
    summary = groups.mean().join(groups.sem().add_suffix(' error')).sort_index(axis=1)
    summary.insert(0, 'seeds', groups.size())
    rows = [row for row in itertools.product(TRAINING, DATA) if row in summary.index]
    return summary.loc[rows].reset_index()


def show(summary: pd.DataFrame, eps: float):
    """Prints the averages in percent."""
    shown = summary[['training', 'data']].replace({'data': DATA})
    for name, title in MEASURES.items():
        for kind, form in (('', '.2f'), (' gain', '+.2f')):
            shown[title + kind] = studies.plus_minus(
                summary, f'{name}{kind}', f'{name}{kind} error', form, 100)
        shown.loc[summary['data'] == 'real', f'{title} gain'] = ''
    means = ', mean ± standard error over seeds' if summary['seeds'].max() > 1 else ''
    print(f'\nTest accuracy in %, clean and under PGD with eps {eps:.4f}{means}; gain: over real '
          f'data alone\n{shown.to_string(index=False)}')


def _is_table(path: str) -> bool:
    with open(path) as file:
        return file.readline(1000).startswith('training,data,')


TABLE = cli.Written('table of results', ['.csv'], _is_table)
EXAMPLES = """\b
Examples:
  # The study's question on CIFAR-10, on 4 GPUs
  torchrun --standalone --nproc_per_node=4 evaluate_data.py --outdir=runs/evaluate \\
      --data=cifar10-train.zip --test=cifar10-test.zip --generated=out_cifar10 \\
      --selected=npz_cifar10/1m.npz --model=wrn-28-10
\b
The same command goes on where it was stopped; finished classifiers are not trained again."""


@click.command(cls=cli.Command, epilog=EXAMPLES)
@options.text('DIR', '--outdir', 'Where results and the runs go', required=True,
              type=cli.FOLDER)
@options.text('PATH', '--data', 'Real training images, with labels', required=True)
@options.text('PATH', '--test', 'Real test images, with labels', required=True)
@options.text('DIR|NPZ', '--generated',
              'Generated images: a folder of generate.py, or an .npz of combine_data.py')
@options.text('DIR|NPZ', '--selected', 'Selected images: an .npz of select_1M.py')
@options.text('LIST', '--training', 'plain, adversarial, or both', default='plain,adversarial')
@options.integers('--seeds', '0', 'Classifiers of each kind, by seed')
@train_classifier.training_options
@options.batch_gpu
@options.verify
@cli.overwrite
@options.integer('--jobs', None, 'Classifiers that train at a time  [default: one for each core, '
                                 'up to 8; one on a GPU or under torchrun]')
def main(outdir, data, test, generated, selected, training, seeds, jobs, **settings):
    """Train classifiers on real images alone, with generated and with selected ones, for the same
    number of steps.

    Prints test accuracy without and with attack (PGD, l-infinity) of each, and writes results.csv
    and summary.csv.
    """
    trainings = [name.strip() for name in training.split(',')]
    if set(trainings) - set(TRAINING) or len(set(trainings)) < len(trainings):
        raise UserError(f'--training={training}: give plain, adversarial, or plain,adversarial')
    if len(set(seeds)) < len(seeds):
        raise UserError('--seeds: give each number once')
    sources = {'real': None, 'generated': generated, 'selected': selected}
    sources = {name: path for name, path in sources.items() if path or name == 'real'}
    if len(sources) == 1:
        raise UserError('nothing to compare with: give --generated, --selected or both')
    dist.init()
    if dist.get_world_size() > 1:
        if jobs not in (None, 1):
            raise UserError(f'--jobs={jobs}: under torchrun classifiers train one after the other')
        jobs = 1
    planned = plan(outdir, data, test, sources, trainings, seeds,
                   settings | dict(ls=1.0, bench=True))
    images = {run.data: train_classifier.open_data(run.config)[0].fingerprint
              for run in planned[:len(sources)]}  # what is wrong with it is said now
    planned = [dataclasses.replace(run, fingerprint=images[run.data]) for run in planned]
    for name in ('results.csv', 'summary.csv'):
        TABLE.check_path(os.path.join(outdir, name), 'outdir')
    click.get_current_context().with_resource(runs.claimed(outdir, 'working'))
    dist.print0(f'{len(planned)} classifiers {settings["model"]} of {settings["duration"]} '
                f'training images in {outdir}')
    try:
        train_all(planned, jobs or parallel.default_jobs())
    except KeyboardInterrupt:
        raise UserError('stopped; the same command goes on from here') from None
    if dist.get_rank() == 0:
        results = table(planned)
        summary = summarise(results)
        studies.save_tables(outdir, results=results, summary=summary)
        show(summary, settings['eps'])
        print(f'\nresults.csv and summary.csv are in {outdir}')
    dist.shutdown()


if __name__ == '__main__':
    main()
