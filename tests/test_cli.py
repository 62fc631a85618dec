"""Command lines: what the library says of a field, a script says of its option."""

import click
import pytest
from click.testing import CliRunner

from dnnlib import UserError, cli
from dnnlib.util import renamed_fields


@pytest.mark.parametrize('field, value, printed', [
    ('batch_gpu', 0, '--batch-gpu=0 must be at least 1'),
    ('batch_gpu', None, '--batch-gpu: must be at least 1'),
    ('dest', 'x.png', '--grid=x.png must be at least 1'),       # renamed on the way
    ('source', 'x.zip', 'x.zip must be at least 1'),            # the command has no such option
    ('source', None, 'must be at least 1'),
    (None, None, 'must be at least 1'),
])
def test_errors_name_the_option_of_the_command(field, value, printed):
    @click.command(cls=cli.Command)
    @click.option('--batch-gpu')
    @click.option('--grid', '-g')
    def main(batch_gpu, grid):
        with renamed_fields(dest='grid'):
            raise UserError('must be at least 1', field=field, value=value)

    result = CliRunner().invoke(main, [])
    assert (result.exit_code, result.output) == (1, f'Error: {printed}\n')


def test_without_a_command_line_the_field_is_named():
    assert str(UserError('must be at least 1', field='batch', value=0)) == 'batch=0 must be at least 1'
    assert str(UserError('x.zip: no such file')) == 'x.zip: no such file'
