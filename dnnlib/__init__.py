"""Configuration objects, files, URLs and command lines: everything that knows nothing of torch."""

from dnnlib.util import UserError  # noqa: F401
