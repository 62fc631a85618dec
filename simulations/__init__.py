"""Gaussian estimation from several sources: a study on paper that needs no network."""
