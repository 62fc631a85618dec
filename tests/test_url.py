"""Downloads: complete or not at all, resumed, checked, and not needed again."""

import hashlib
import http.server
import os
import threading

import click.testing
import pytest
from helpers import script_module, write_digits
from test_foreign import as_pickle
from test_snapshot_tool import small

from dnnlib import UserError, url

DATA = bytes(range(256)) * 4000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.data`; cuts a connection after `server.cuts.pop(0)` bytes, if there is any."""

    def do_GET(self):
        data, tag = self.server.data, self.server.tag
        wanted = self.headers.get('Range')
        self.server.ranges.append(wanted)
        start = int(wanted[6:].rstrip('-')) if wanted and self.headers.get('If-Range') == tag and self.server.partial else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        if tag:
            self.send_header('ETag', tag)
        self.send_header('Content-Length', str(len(data) - start))
        self.end_headers()
        count = self.server.cuts.pop(0) if self.server.cuts else len(data)
        self.wfile.write(data[start:start + count])
        if start + count < len(data):
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    made = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    made.data, made.tag, made.partial, made.cuts, made.ranges = DATA, '"one"', True, [], []
    made.url = f'http://127.0.0.1:{made.server_port}/folder/net.pkl'
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def content(path):
    with open(path, 'rb') as file:
        return file.read()


def test_a_download_is_kept_and_not_needed_again(server, capsys):
    path = url.download(server.url)
    assert content(path) == DATA and os.path.basename(path).endswith('-net.pkl')
    assert 'Downloading net.pkl' in capsys.readouterr().err
    server.shutdown()                                            # offline
    assert url.download(server.url) == path and len(server.ranges) == 1
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def test_a_cut_download_goes_on_where_it_was(server):
    server.cuts = [300_000, 200_000, 1]
    assert content(url.download(server.url)) == DATA
    starts = [int(text[6:-1]) for text in server.ranges[1:]]
    assert len(starts) == 3 and 0 < starts[0] <= 300_000 and starts == sorted(starts)


def test_the_next_process_goes_on(server):
    server.cuts = [400_000] + [0] * url.ATTEMPTS
    with pytest.raises(UserError, match='cannot be downloaded'):
        url.download(server.url)
    path = url.cache_path(server.url)
    assert not os.path.exists(path) and 0 < os.path.getsize(path + '.part') <= 400_000
    server.ranges, server.cuts = [], []
    assert content(url.download(server.url)) == DATA
    assert server.ranges[0].startswith('bytes=') and os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def test_parts_of_two_versions_are_never_joined(server):
    server.cuts = [400_000] + [0] * url.ATTEMPTS
    with pytest.raises(UserError):
        url.download(server.url)
    server.cuts, server.data, server.tag = [], DATA[::-1], '"two"'
    assert content(url.download(server.url)) == DATA[::-1]


@pytest.mark.parametrize('tag, partial', [(None, True), ('"one"', False), ('W/"weak"', True)])
def test_servers_that_cannot_resume_start_again(server, tag, partial):
    server.tag, server.partial, server.cuts = tag, partial, [400_000]
    assert content(url.download(server.url)) == DATA


def test_the_checksum_is_asked_for(server):
    right = hashlib.sha256(DATA).hexdigest()
    with pytest.raises(UserError, match='instead of 000'):
        url.download(server.url, sha256='0' * 64)
    assert os.listdir(url.cache_folder()) == []
    path = url.download(server.url, sha256=right.upper())
    assert url.download(server.url, sha256=right) == path
    with pytest.raises(UserError, match='in the cache'):
        url.download(server.url, sha256='0' * 64)
    with pytest.raises(UserError, match='64 hexadecimal'):
        url.download(server.url, sha256='12')
    assert url.download(path, sha256=right) == path


def test_processes_that_ask_at_once_fetch_once(server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(url.download(server.url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(server.ranges) == 1 and content(found[0]) == DATA


def test_scripts_check_what_they_download(server, tmp_path):
    as_pickle(tmp_path / 'net', small('edm'))
    write_digits(tmp_path / 'd.zip', 20)
    server.data = content(tmp_path / 'net')
    wrong = ('0' * 64, 'instead of 000')
    for script, *arguments in (
            ('generate_images.py', f'--net={server.url}', '--outdir', tmp_path / 'out', '--sha256', wrong[0]),
            ('generate_images.py', f'--net={tmp_path / "net"}', f'--gnet={server.url}', '--outdir', tmp_path / 'out',
             '--gnet-sha256', wrong[0]),
            ('calculate_metrics.py', 'memorization', f'--net={server.url}', '--data', tmp_path / 'd.zip', '--sha256', wrong[0]),
            ('calculate_metrics.py', 'calc', '--images', tmp_path / 'd.zip', f'--ref={server.url}', '--ref-sha256', wrong[0]),
            ('train.py', '--data', tmp_path / 'd.zip', '--outdir', tmp_path / 'runs', f'--transfer={server.url}',
             '--transfer-sha256', wrong[0], '--num-channels=4', '--num-blocks=1', '--cres=1'),
            ('snapshot_tool.py', 'inspect', server.url, '--sha256', wrong[0])):
        result = click.testing.CliRunner().invoke(script_module(script).main, list(map(str, arguments)))
        last = result.stderr.splitlines()[-1]                    # after the progress bar of the download
        assert result.exit_code == 1 and last.startswith('Error: ') and wrong[1] in last, script
