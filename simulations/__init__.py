"""Gaussian estimation from several sources: a study on paper that needs no network."""

import pathlib

RESULTS = str(pathlib.Path(__file__).resolve().parent / 'results' / 'gaussian')
