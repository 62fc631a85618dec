"""Does class-balancing training help rare classes? In miniature, on handwritten digits.

Trains on a long tail of the digits, several seeds each: a plain conditional model, a
class-balancing one, and a plain one that is fine-tuned with class-balancing for the last third,
all with the same number of steps. The plain model is also sampled with labels as weak as
class-balancing training makes them, which needs no training. Each is guided more and more: which
trades how many samples a classifier recognises for how much of the real digits they cover, by a
curve for each method.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click
import numpy as np

from dnnlib import UserError, cli, lazy, options

with lazy.imports(__name__ == '__main__'):
    import pandas as pd
    import torch

    from long_tail import make_stats
    from long_tail.weakened import WeakenedLabels, share_of_labels
    from training.checkpoint import StepCheckpoints
    from training.data import convert
    from training.diffusion import heldout
    from training.encoders import RGBEncoder
    from training.snapshot import load_snapshot

import studies
from dnnlib.util import write_json
from long_tail import main as long_tail
from long_tail.imbalance import long_tailed
from long_tail.tradeoff import METHODS, differences, draw, summarize
from studies import WHOLE, compared, setting

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)                              # shares of the steps
TAIL = 0.05                                                    # nines for each zero
RECIPE = [
    # A network that a CPU trains in minutes: two levels of 64 channels, one block at each on the
    # way up. Levels of 32 channels would not see the labels, see training/networks/ddpm.py.
    '--ch=64', '--ch_mult=1', '--ch_mult=1', '--attn=', '--num_res_blocks=0',
    '--data_type=zip', '--img_size=8', '--conditional', '--num_workers=1',
    # Less noise at the end than usual (abar_T = 0.0066, not 0.00004): it is enough for 8x8 pixels,
    # and from x_T the first prediction of x_0, which this sampler does not clip, is then 12 times
    # the error of the network, not 157 times.
    '--beta_T=0.01', '--lr=1e-3', '--warmup=100', '--ema_decay=0.995', '--sample_step=0']
MEASURES = ['fd_pixels', 'precision', 'recall', 'recognition']


@dataclasses.dataclass(frozen=True)
class Model:
    """One network to train, or to sample with weak labels."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder: weak labels are of the plain model."""
        return f'{"plain" if self.method == "weakened" else self.method}-seed{self.seed}'


@dataclasses.dataclass(frozen=True)
class Study(studies.Study):
    seeds: cli.INT_LIST = compared('0-2', 'Seeds of weights, data order and noise')
    methods: cli.Parsed('list', lambda text: text.split(',')) = compared(
        'plain,cb,weakened', f'What to compare: some of {",".join(METHODS)}')
    omegas: cli.NUMBERS = compared(
        '0,0.4,1', 'Strengths of guidance of the plain model; others get (1 + OMEGA) '
        '(1 + 5/8 TAU) - 1, which makes up for weak labels at half of the noise')
    steps: click.IntRange(min=3) = setting(1500, 'Training steps of every model')
    batch: WHOLE = setting(32, 'Images of one step')
    tau: options.NOT_NEGATIVE = setting(1.0, 'Weight of the class-balancing term')
    samples: click.IntRange(min=200) = setting(500, 'Images that a model generates')
    ddim_steps: click.IntRange(2, 1000) = setting(15, 'Sampling steps')

    def check(self):
        plan(self)
        if min(self.omegas) < 0:
            raise UserError('give strengths from 0 up', 'omegas')

    @property
    def settings(self) -> dict:
        return super().settings | {'recipe': RECIPE, 'imb_factor': TAIL}

    @property
    def reference(self) -> str:
        return self.path('digits.npz')

    def data(self, seed: int) -> str:
        """The long tail that a seed draws."""
        return self.path('data', f'seed{seed}.zip')

    def heldout(self, seed: int) -> str:
        """The digits that are not in it."""
        return self.path('data', f'seed{seed}-heldout.zip')

    @property
    def pretrained(self) -> int:
        """The checkpoint of the plain model that fine-tuning starts from, after two thirds."""
        return self.steps * 2 // 3 - 1

    def last(self, model: Model) -> int:
        """Number of a model's last step. Steps are numbered from 0, and fine-tuning goes on from
        the number of its checkpoint; so after as many steps in all it ends one number earlier."""
        return self.steps - 1 - (model.method == 'finetune')

    def checkpoint(self, model: Model) -> str:
        return StepCheckpoints(self.run_dir(model)).path(self.last(model))

    def omega(self, model: Model, omega: float) -> float:
        """The strength that suits a method where plain has `omega`."""
        if model.method == 'plain':
            return omega
        return round((1 + omega) / share_of_labels(self.tau, 0.5) - 1, 4)

    def weaken(self, model: Model) -> float:
        """--weaken_labels of main.py."""
        return self.tau * (model.method == 'weakened')

    def result(self, model: Model, omega: float) -> str:
        """The measures that main.py writes."""
        weak = f'_weakened{self.tau:g}' if self.weaken(model) else ''
        name = f'saved_{self.last(model)}_cfg_omega{omega:g}{weak}_ddim{self.ddim_steps}.json'
        return os.path.join(self.run_dir(model), name)

    def losses(self, model: Model) -> str:
        return os.path.join(self.run_dir(model), f'heldout-{model.method}.json')


def plan(study: Study) -> list[list[Model]]:
    """Chains of models, side by side: what starts from the plain model of its seed follows it.
    One seed after the other, so that a study that ends early has whole seeds."""
    methods = set(study.methods)
    if not methods <= METHODS.keys() or 'plain' not in methods or len(methods) == 1:
        others = ','.join(name for name in METHODS if name != 'plain')
        raise UserError(f'give plain and some of {others}, which are compared with it', 'methods')
    chains = [methods & {'cb'}, methods - {'cb'}]
    return [[Model(method, seed) for method in METHODS if method in chain]
            for seed in study.seeds for chain in chains if chain]


def flags_of(study: Study, model: Model, **more) -> dict:
    """Options of main.py for a model."""
    flags = dict(batch_size=study.batch, seed=model.seed, logdir=study.run_dir(model),
                 root=study.data(model.seed), log_step=max(study.steps // 6, 1),
                 total_steps=study.steps, save_step=study.pretrained, img_channels=1)
    plain = model.method in ('plain', 'weakened')
    switches = ['--cfg'] if plain else ['--cb', f'--tau={study.tau}']
    if model.method == 'finetune':
        switches.append('--finetune')
        flags |= dict(finetuned_logdir=study.run_dir(model), ckpt_step=study.pretrained,
                      logdir=study.run_dir(Model('plain', model.seed)),
                      total_steps=study.steps - study.pretrained - 1)
    switches += ['--eval', '--recognition', '--noprd'] if more else ['--train']
    # Mirrored digits are no digits.
    return long_tail.settings([*RECIPE, '--noxflip', *switches, *studies.arguments(flags | more)])


def run_chain(study: Study, chain: list[Model]):
    """Trains models one after the other and measures them, as far as that is not done."""
    for model in chain:
        studies.make(study.checkpoint(model), long_tail.train, flags_of(study, model))
        for plain_omega in study.omegas:
            omega = study.omega(model, plain_omega)
            flags = flags_of(study, model, ckpt_step=study.last(model), omega=omega,
                             weaken_labels=study.weaken(model), batch_size=250,
                             detector='pixels', fid_cache=study.reference,
                             num_images=study.samples, ddim_steps=study.ddim_steps)
            studies.make(study.result(model, omega), long_tail.evaluate, flags)
        studies.make(study.losses(model), measure_loss, study, model)


def make_data(study: Study, seed: int):
    """Writes a long tail of the digits, drawn by seed, and all others."""
    every = convert.by_class(studies.digits())
    drawn = np.isin(every.indices, long_tailed(studies.digits().labels, 10, 'exp', TAIL, seed))
    for path, keep in ((study.data(seed), drawn), (study.heldout(seed), ~drawn)):
        part = dataclasses.replace(every, indices=every.indices[keep], labels=every.labels[keep])
        studies.make_archive(study, path, part)


def measure_loss(study: Study, model: Model):
    """Writes DDPM's loss on the held-out digits of each class: {class: mean}."""
    snapshot = load_snapshot(study.checkpoint(model))
    if study.weaken(model):
        snapshot = dataclasses.replace(snapshot, net=WeakenedLabels(snapshot.net, study.tau))
    measure, data = heldout.loss_of_snapshot(snapshot, study.heldout(model.seed))
    means = pd.Series(measure().of_images).groupby(data.label_ids).mean()
    write_json(study.losses(model), means.to_dict())


# --- Results -------------------------------------------------------------------------------------


def collect(study: Study, models: list[Model]):
    """Three tables: a row for each model, omega and class with fd_pixels, precision, recall and
    recognition; the same with their means over the classes of each group; and the held-out loss of
    each model and group (classes that are all in the long tail are left out of the mean)."""
    rows = []
    tables = []
    losses = []
    for model in models:
        key = dataclasses.asdict(model)
        for omega in study.omegas:
            at = key | {'omega': study.omega(model, omega)}
            result = json.loads(Path(study.result(model, at['omega'])).read_text())
            classes = pd.DataFrame(result['classes']).assign(**at)
            tables.append(classes)
            groups = {name: group['classes'] for name, group in result['groups'].items()}
            rows += [at | {'group': name} | tables[-1].loc[labels, MEASURES].mean().to_dict()
                     for name, labels in ({'all': classes.index} | groups).items()]
        loss = pd.Series(json.loads(Path(study.losses(model)).read_text())).rename(int)
        losses += [key | {'group': name, 'loss': loss.reindex(labels).mean()}
                   for name, labels in groups.items()]
    return pd.concat(tables, ignore_index=True), pd.DataFrame(rows), pd.DataFrame(losses)


def label_effect(study: Study, models: list[Model]) -> pd.DataFrame:
    """How much labels change the predicted noise at some t/T (`at`), in shares of the plain model
    of the same seed; rows as of `differences`.

    RMS over noised digits of eps(x_t, t, y) - eps(x_t, t, no label). As `formula`: the share at
    the minimum of the class-balancing loss (see weakened.py).
    """
    source = studies.digits()
    chosen = np.random.RandomState(0).permutation(len(source))[:200]
    x_0 = RGBEncoder().encode_latents(torch.from_numpy(source.stack(chosen)).permute(0, 3, 1, 2))
    labels = torch.from_numpy(np.eye(10, dtype=np.float32)[source.labels[chosen]])
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    effects = {}
    for model in models:
        net = load_snapshot(study.checkpoint(model)).net
        for share in TIMES:
            t = torch.full([len(x_0)], int(share * net.diffusion.num_steps))
            x_t = net.diffusion.q_sample(x_0, t, noise)
            with torch.inference_mode():
                change = net(x_t, step=t, class_labels=labels) - net(x_t, step=t)
            effects[model.method, share, model.seed] = change.square().mean().sqrt().item()
    return pd.DataFrame([
        dict(measure='label effect', method=method, than='plain', at=share, seed=seed,
             value=effect / effects['plain', share, seed],
             formula=share_of_labels(study.tau, share))
        for (method, share, seed), effect in effects.items()
        if method != 'plain' and ('plain', share, seed) in effects])


@studies.command(Study, """  # The study of its page, with intervals of six seeds
  python long_tail/digits_long_tail.py --seeds=0-5 --methods=plain,cb,finetune,weakened \\
    --omegas=0,0.2,0.4,0.7,1,1.5
""")
def main(study):
    """Compares plain, class-balancing and fine-tuned diffusion models on long-tailed handwritten
    digits, and plain ones that are sampled with weak labels.

    Writes classes.csv, results.csv, heldout.csv, differences.csv and summary.csv, study.png and
    study.svg, report.html, and in models/ a run folder of main.py for each model.
    """
    study.claim()
    chains = plan(study)
    studies.make(study.reference, make_stats.make, 'digits', study.reference, 'pixels',
                 img_channels=1)
    for seed in study.seeds:
        make_data(study, seed)
    models = [model for chain in chains for model in chain]
    trained = [model for model in models if model.method != 'weakened']
    print(f'{len(trained)} models of {study.steps} steps, in {study.outdir}', flush=True)
    for _ in study.run(run_chain, chains, len, unit='model'):
        pass
    classes, results, losses = collect(study, models)
    rows = pd.concat([differences(results, losses), label_effect(study, trained)])
    summary = summarize(rows)
    shown = studies.texts(summary, ['measure', 'method', 'than', 'at', 'formula', 'zero', 'same'],
                          {'value': 'value'}, '+.3f')
    print(f'\nMeans over seeds with intervals:\n{shown.to_string(index=False, na_rep="")}')
    study.save(draw(results, summary), classes=classes, results=results, heldout=losses,
               differences=rows, summary=summary)


if __name__ == '__main__':
    main()
