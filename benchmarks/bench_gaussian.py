"""Gaussian simulations against the plain implementation, which builds one MultivariateNormal for each test point."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import cli, lazy

with lazy.imports(__name__ == '__main__'):
    import torch

    from simulations import gaussian


from simulations import run_gaussian, tables


def plain_sample(means: torch.Tensor, count: int, random: torch.Generator):
    """Points [count, D] of the mixture and their labels [count], in the order in which the labels are drawn."""
    K, D = means.shape
    labels = torch.multinomial(torch.full((K,), 1 / K), count, replacement=True, generator=random)
    points = torch.zeros(count, D)
    for k in range(K):
        members = labels == k
        if members.any():
            points[members] = torch.randn(int(members.sum()), D, generator=random) + means[k]
    return points, labels


def plain_densities(points: torch.Tensor, labels: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Density of each point under its own source, [N], one distribution at a time."""
    covariance = torch.eye(means.shape[1])
    return torch.stack([
        torch.distributions.MultivariateNormal(means[label], covariance).log_prob(point).exp()
        for point, label in zip(points, labels, strict=True)])


def plain_simulate(setting: gaussian.Setting, seed: int, test_points: int = 500) -> tuple[float, float]:
    """One seed of `gaussian.simulate` as one writes it first, step by step as the paper describes it."""
    random = torch.Generator().manual_seed(seed)
    means = setting.means()
    points, labels = plain_sample(means, setting.n, random)
    single = torch.stack([points[labels == k].mean(0) for k in range(setting.K)])
    multi = single.clone()
    if setting.shared > 0:
        multi[:, -setting.shared:] = points.mean(0)[-setting.shared:]
    points, labels = plain_sample(means, test_points, random)
    true = plain_densities(points, labels, means)
    ratios = [plain_densities(points, labels, estimate) / true for estimate in (single, multi)]
    return tuple((0.5 * (ratio - 1).abs().mean()).item() for ratio in ratios)


def compare(seeds=tables.PAPER_SEEDS, values=tuple(run_gaussian.VALUES['K']), clock=time.perf_counter) -> dict:
    """Times the simulations of --tag=K both ways in this process: seconds, their ratio, largest relative difference."""
    torch.set_num_threads(1)  # tensors this small gain nothing from threads, and lose much if the cores are busy
    fixed = {name: value for name, value in run_gaussian.DEFAULTS.items() if name != 'K'}
    settings = [gaussian.Setting(K=K, D=10, **fixed) for K in values]

    def optimised():
        start = clock()
        errors = gaussian.simulate_many(settings, seeds, workers=1)
        return clock() - start, errors

    first, errors = optimised()  # includes what torch does once
    repeated = min(optimised()[0] for _ in range(10))
    start = clock()
    plain = [plain_simulate(setting, seed) for setting in settings for seed in seeds]
    seconds = clock() - start
    difference = max(abs(a - b) / b for x, y in zip(errors, plain, strict=True) for a, b in zip(x, y, strict=True))
    return dict(plain=seconds, first=first, repeated=repeated, ratio=seconds / repeated, difference=difference)


def process_seconds(*args: str) -> float:
    """Seconds of a whole `run_gaussian.py`, from start to exit."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / 'simulations' / 'run_gaussian.py'), *args, f'--outdir={folder}'],
                       check=True, capture_output=True)
        return time.perf_counter() - start


@click.command(cls=cli.Command)
def main():
    """Times the experiment of Figure 1 (a) plain and optimised, whole processes, and 10,000 seeds."""
    result = compare()
    print(f'--tag=K, plain (one MultivariateNormal per test point)  {result["plain"]:9.3f} s')
    print(f'--tag=K, optimised, first call                          {result["first"]:9.3f} s')
    print(f'--tag=K, optimised, repeated                            {result["repeated"]:9.3f} s')
    print(f'ratio of plain to the first call                        {result["plain"] / result["first"]:9.0f}')
    print(f'ratio of plain to repeated calls                        {result["ratio"]:9.0f}')
    print(f'largest relative difference of an error                 {result["difference"]:9.1e}')
    print(f'--tag=K, optimised, whole process                       {process_seconds("--tag=K"):9.3f} s')
    many = process_seconds('--tag=K', '--values=5', '--seeds=0-9999')
    print(f'10,000 seeds of the default setting, whole process      {many:9.3f} s')


if __name__ == '__main__':
    main()
