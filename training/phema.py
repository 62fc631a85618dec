"""Power-function EMA profiles and their reconstruction after training.

arXiv 2312.02696, Section 3 and Appendix C.

A profile is given by the time `ofs` at which it ends (in training images) and its relative width
`std`. All arithmetic is in double precision.
"""

import re
import zipfile

import numpy as np

from dnnlib import UserError
from training import snapshot

MADE = 'phema'  # prefix of the snapshots of reconstructed networks


def exp_to_std(exp):
    """Relative width of the profile t^exp: sqrt((g + 1) / ((g + 2)^2 (g + 3))) (Eq. 123)."""
    return np.sqrt((exp + 1) / ((exp + 2) ** 2 * (exp + 3)))


@np.vectorize
def std_to_exp(std):
    """Exponent for a relative width: the largest real part of the roots of the cubic (Eq. 126)."""
    t = std ** -2.0
    return np.roots([1, 7, 16 - t, 12 - t]).real.max()


def power_function_beta(std, t_next, t_delta):
    """beta = (1 - t_delta / t_next)^(exp + 1) (Eq. 127).

    t_next   images after the step
    t_delta  its batch
    """
    return (1 - t_delta / t_next) ** (std_to_exp(std) + 1)


def power_function_response(ofs, std, length):
    """Profiles at the times 0 .. length - 1, each with sum 1: [length, profiles] (Eq. 120)."""
    exp = std_to_exp(std)
    t = np.arange(length)[:, None] / ofs
    response = np.where(t <= 1, np.minimum(t, 1) ** exp * (exp + 1) / ofs, 0)
    return response / response.sum(axis=0)


def power_function_correlation(a_ofs, a_std, b_ofs, b_std):
    """Inner product of two profiles over time (Eq. 151)."""
    a_exp = std_to_exp(a_std)
    b_exp = std_to_exp(b_std)
    # The integral of both powers ends where the shorter profile does.
    first = np.minimum(a_ofs, b_ofs)
    last = np.maximum(a_ofs, b_ofs)
    last_exp = np.where(a_ofs < b_ofs, b_exp, a_exp)
    peaks = (a_exp + 1) * (b_exp + 1) / last
    return peaks / (a_exp + b_exp + 1) * (first / last) ** last_exp


def solve_coefficients(in_ofs, in_std, out_ofs, out_std):
    """Weights [inputs, outputs] that make the output profiles from the input profiles (least
    squares, Eq. 143). The weights of an output sum to 1. Raises UserError for equal inputs.
    """
    in_ofs, in_std = np.float64(np.broadcast_arrays(in_ofs, in_std)).reshape(2, -1, 1)
    out_ofs, out_std = np.float64(np.broadcast_arrays(out_ofs, out_std)).reshape(2, -1, 1)
    A = power_function_correlation(in_ofs, in_std, in_ofs.T, in_std.T)
    B = power_function_correlation(in_ofs, in_std, out_ofs.T, out_std.T)
    try:
        X = np.linalg.solve(A, B)
    except np.linalg.LinAlgError:
        raise UserError('two of the snapshots are of one time and one width, e.g. copies under '
                        'other names; remove one, or choose widths of inputs', 'instd') from None
    return X / X.sum(axis=0)


def list_profiles(folder: str, prefix: str | None = None, stds=None) -> list[tuple]:
    """(SnapshotFile, nimg, std, state) of snapshots `<prefix>-<kimg>-<std>.pkl`, in order, of all
    widths or of `stds`.

    States stay in the files until they are used; that of EDM2's snapshots is None. What a snapshot
    does not say follows from its name; of nimg it has the thousands, rounded down, which is undone
    where batches are multiples of 1024; of 0 nothing follows. Without a prefix, those called MADE
    do not count beside others. Raises UserError if there are none, or if `prefix` is None and
    there are several.
    """
    wanted = stds and [f'{std:.3f}' for std in stds]
    files = [file for file in snapshot.list_snapshots(folder, prefix)
             if re.fullmatch(r'\d+\.\d{3}', file.average)
             and (not wanted or file.average in wanted)]
    prefixes = sorted({file.prefix for file in files})
    if prefix is None and len(prefixes) > 1 and MADE in prefixes:
        prefixes.remove(MADE)
        files = [file for file in files if file.prefix != MADE]
    if not files:
        widths = f', STD {" or ".join(wanted)}' if wanted else ''
        raise UserError(f'{folder}: no snapshots called {prefix or "PREFIX"}-KIMG-STD.pkl{widths}')
    if len(prefixes) > 1:
        raise UserError(f'is needed: {folder} has snapshots of several runs '
                        f'({", ".join(prefixes)})', 'inprefix')
    profiles = []
    for file in files:
        content = dict(nimg=None, ema_std=None, state=None)
        if zipfile.is_zipfile(file.path):
            content = snapshot.read_snapshot(file.path)
        nimg = content['nimg'] or (file.kimg * 1000 + 999) // 1024 * 1024
        if nimg:
            std = content['ema_std'] or float(file.average)
            profiles.append((file, nimg, std, content['state']))
    if not profiles:
        raise UserError(f'{folder}: its snapshots are of the first thousand images, and their '
                        'names do not say of how many; train longer')
    return profiles


def combine(states, coefficients, parameters):
    """sum_i coefficients[i, k] states[i] for each output k, one state after the other.

    states      iterable of state dictionaries
    parameters  names of what is averaged; other entries (buffers) are those of the last state

    Returns one state dictionary, of float64, for each column of `coefficients`.
    """
    outputs = [{} for _ in coefficients.T]
    for state, row in zip(states, coefficients.tolist(), strict=True):
        for output, weight in zip(outputs, row, strict=True):
            for name, value in state.items():
                if name in parameters:
                    value = output.get(name, 0) + weight * value.double()
                output[name] = value
    return outputs
