"""Downloads: complete or not at all, resumed, checked, and not needed again."""

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import shutil
import ssl
import subprocess
import sys
import threading
import time
import zipfile
import zlib

import click.testing
import numpy as np
import pytest
from helpers import ROOT, environment, run, script_module, write_digits
from test_foreign import as_pickle
from test_snapshot_tool import small

from dnnlib import UserError, budget, progress, url, util
from dnnlib.image_io import encode_png

DATA = bytes(range(256)) * 4000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.data`; cuts a connection after `server.cuts.pop(0)` bytes, if there is any. Before, it answers by
    the functions `server.answers`, one for each request.
    """

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get('Authorization')))
        if self.server.answers:
            self.close_connection = True
            with contextlib.suppress(OSError):                   # the client has enough
                self.server.answers.pop(0)(self)
            return
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


@contextlib.contextmanager
def serving(certificate=None):
    made = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    made.data, made.tag, made.partial, made.cuts, made.ranges = DATA, '"one"', True, [], []
    made.answers, made.asked = [], []
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        made.socket = context.wrap_socket(made.socket, server_side=True)
    made.url = f'http{"s" if certificate else ""}://127.0.0.1:{made.server_port}/folder/net.pkl'
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path / 'cache'))
    with serving() as made:
        yield made


def answer(*lines, body=b'', version='1.1'):
    """An answer with these lines at its head, and no length but what they say. `body` may be a generator."""
    def send(handler):
        handler.wfile.write('\r\n'.join((f'HTTP/{version} {lines[0]}', *lines[1:], '', '')).encode())
        for part in [body] if isinstance(body, bytes) else body:
            handler.wfile.write(part)

    return send


def chunked(*parts, end=b'0\r\n\r\n'):
    return b''.join(b'%x\r\n%s\r\n' % (len(part), part) for part in parts) + end


CHUNKED = '200 OK', 'Transfer-Encoding: chunked'


def refusal(address, **options) -> str:
    """The line that ends a download; nothing is in the cache then."""
    with pytest.raises(UserError) as caught:
        url.download(address, **options)
    assert not os.path.exists(url.cache_path(address)) and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def files_of_the_cache():
    return [os.path.join(url.cache_folder(), name) for name in sorted(os.listdir(url.cache_folder()))]


def content(path):
    with open(path, 'rb') as file:
        return file.read()


def test_a_download_is_kept_and_not_needed_again(server, capsys, monkeypatch):
    monkeypatch.setattr(progress, 'LINE_SECONDS', 0)             # it takes less than a minute
    path = url.download(server.url)
    assert content(path) == DATA and os.path.basename(path).endswith('-net.pkl')
    assert 'Downloading net.pkl' in capsys.readouterr().err
    server.shutdown()                                            # offline
    assert url.download(server.url) == path and len(server.ranges) == 1
    assert files_of_the_cache() == [path, path + url.RECORD]


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
    assert server.ranges[0].startswith('bytes=') and files_of_the_cache() == [path, path + url.RECORD]


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


# --- What is used is checked ---------------------------------------------------------------------


def start_download(address, **options):
    """A process that downloads, and prints a line when it begins."""
    code = f'from dnnlib import url; print("begins", flush=True); print(url.download({address!r}, **{options}))'
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_a_file_that_another_process_fetches_meanwhile_is_checked(server):
    asked, go = threading.Event(), threading.Event()

    def late(handler):
        asked.set()
        go.wait(60)
        answer('200 OK', f'Content-Length: {len(DATA)}', body=DATA)(handler)

    server.answers = [late]
    right = hashlib.sha256(DATA).hexdigest()
    processes = [start_download(server.url)]
    assert asked.wait(60)
    processes += [start_download(server.url, sha256=digest) for digest in ('0' * 64, right)]
    for process in processes:
        process.stdout.readline()
    time.sleep(1)                                                # now they wait for the lock
    go.set()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 1, 0] and len(server.asked) == 1
    assert 'instead of 000' in outputs[1][1].splitlines()[-1]


def test_all_processes_of_torchrun_check(server, tmp_path):
    as_pickle(tmp_path / 'net', small('edm'))
    server.data = content(tmp_path / 'net')
    url.download(server.url)
    result = run('generate_images.py', f'--net={server.url}', '--seeds=0-1', f'--outdir={tmp_path}/out', f'--sha256={"0" * 64}',
                 processes=2, check=False)
    assert result.returncode == 1 and 'instead of 000' in result.stderr and not (tmp_path / 'out').exists()


def test_a_cached_file_that_has_changed_is_noticed(server):
    path = url.download(server.url)
    before = os.stat(path)
    with open(path, 'r+b') as file:
        file.write(b'other')
    for times in (None, (before.st_atime_ns, before.st_mtime_ns)):   # also if it looks as old as before
        if times:
            os.utime(path, ns=times)
        with pytest.raises(UserError, match=f'{path}.* has changed since it was fetched; remove it'):
            url.download(server.url)
    assert url.download(server.url, sha256=hashlib.sha256(content(path)).hexdigest()) == path  # is wanted like that
    os.remove(path)
    assert content(url.download(server.url)) == DATA
    os.utime(path)                                               # touched alone
    assert url.download(server.url) == path
    assert json.loads(content(path + url.RECORD))['stamp'][1] == os.stat(path).st_mtime_ns


@pytest.mark.parametrize('record', [None, b'', b'[1]', b'{"stamp": 5}', b'[' * 4000, b'{' + b' ' * 10**6 + b'}'])
def test_a_cached_file_without_a_record_is_taken_as_it_is_first_seen(server, record):
    path = url.download(server.url)
    os.remove(path + url.RECORD)
    if record is not None:
        pathlib.Path(path + url.RECORD).write_bytes(record)
    assert url.download(server.url) == path
    pathlib.Path(path).write_bytes(DATA[::-1])
    with pytest.raises(UserError, match='has changed since'):
        url.download(server.url)
    assert len(server.asked) == 1


def test_a_checksum_of_no_file_is_refused(tmp_path):
    write_digits(tmp_path / 'd.zip', 20)
    as_pickle(tmp_path / 'net', small('edm'))
    some, data = '0' * 64, f'--data={tmp_path}/d.zip'
    for command in (f'generate_images.py --net=optimal:{tmp_path}/d.zip --outdir={tmp_path}/o --sha256={some}',
                    f'generate_images.py --net={tmp_path}/net --outdir={tmp_path}/o --gnet-sha256={some}',
                    f'calculate_metrics.py calc --images={tmp_path}/d.zip --metrics=is --ref-sha256={some}',
                    f'train.py {data} --outdir={tmp_path}/runs --transfer-sha256={some}'):
        script, *arguments = command.split()
        result = click.testing.CliRunner().invoke(script_module(script).main, arguments)
        assert result.exit_code == 1 and result.stderr.startswith('Error: ') and (
            f'sha256={some} is of a file' in result.stderr or 'is no file' in result.stderr), result.stderr


def test_a_lock_of_a_file_that_is_gone_is_none(server):
    """Who waited for a process that failed must not write into what that process has removed."""
    path = url.cache_path(server.url) + '.part'
    os.makedirs(url.cache_folder())
    with url._locked(path):
        waiting = start_download(server.url)
        waiting.stdout.readline()
        time.sleep(1)
        os.remove(path)
        with url._locked(path) as other:                         # a third process begins
            other.write(b'half')
            time.sleep(0.5)
    out, _ = waiting.communicate(timeout=60)
    assert content(out.splitlines()[-1]) == DATA


# --- Secrets -------------------------------------------------------------------------------------

SECRETS = 'alice', 'pass-word', 'TOKEN', 'signed', 'piece'


def with_secrets(address):
    return address.replace('://', '://alice:pass-word@') + '?key=TOKEN&id=signed one#piece'


def test_what_is_cut_of_a_url():
    shown = 'https://host.org:81/a/b.pkl'
    for text in (shown, 'https://name:word@host.org:81/a/b.pkl?x=1#y', 'https://na@me:w@host.org:81/a/b.pkl#y',
                 'https://name@host.org:81/a/b.pkl?u=https://x'):
        assert util.without_secrets(text) == shown == str(util.hide(text))
        assert util.without_secrets(f'--net={text} is bad') == f'--net={shown} is bad'
    assert util.without_secrets("'https://a:b@c/d' (https://[::1]:8/x?y)") == "'https://c/d' (https://[::1]:8/x"
    for text in ('https://name:wo/rd@host/x', 'https://name:wo?rd@host/x', 'http://[name'):    # no host begins them
        assert util.without_secrets(text) in ('https://...', 'http://...')
    for text in ('digits', 'a?b#c@d', '/x/y?z', 'text: a//b'):
        assert util.without_secrets(text) is text is util.hide(text)
    assert util.hide('see https://host/a b') == 'see https://host/a b'
    error = UserError(f'is no {with_secrets(shown).replace(" ", "")}', 'net', with_secrets(shown))
    assert not any(secret in f'{error} {error.args}' for secret in SECRETS)
    # Records of earlier versions have the whole of it.
    assert util.finite({'net': [with_secrets(shown).replace(' ', '')]}) == {'net': [shown]}


def test_keys_of_the_cache():
    plain = 'https://host/a/net.pkl'
    assert os.path.basename(url.cache_path(plain)) == hashlib.sha256(plain.encode()).hexdigest()[:16] + '-net.pkl'
    assert url.cache_path(util.hide('https://a:b@host/a/net.pkl#f')) == url.cache_path(plain)
    others = [plain, 'https://host/b/net.pkl', 'https://host2/a/net.pkl', plain + '?id=1', plain + '?id=2']
    assert len({url.cache_path(util.hide(text)) for text in others}) == len(others)


def test_no_secret_of_a_url_is_printed_or_kept(server, tmp_path, monkeypatch):
    as_pickle(tmp_path / 'net', small('edm'))
    write_digits(tmp_path / 'd.zip', 20)
    server.data = content(tmp_path / 'net')
    address, data = with_secrets(server.url), tmp_path / 'd.zip'
    train = ('train.py', '--data', data, '--outdir', tmp_path / 'runs', f'--transfer={address}', '--num-channels=8',
             '--num-blocks=1', '--cres=1,2', '--attn-resolutions=4', '--augment=0', '--duration=0.001', '--duration-rule=fixed', '--batch=100',
             '--tick=1', '--snap=1', '--dump=1', '--seed=1')
    commands = [
        (0, *train),
        (0, 'generate_images.py', f'--net={address}', '--seeds=0', '--outdir', tmp_path / 'o', '--grid', tmp_path / 'g.png'),
        (0, 'calculate_metrics.py', 'memorization', f'--net={address}', '--seeds=0-2', '--data', data,
         '--dest', tmp_path / 'm.json'),
        (0, 'snapshot_tool.py', 'convert', address, '--dest', tmp_path / 'n.safetensors'),
        (1, 'snapshot_tool.py', 'inspect', address, f'--sha256={"0" * 64}'),
        (2, 'snapshot_tool.py', 'inspect', 'x', address.replace(' ', '')),
        (2, 'snapshot_tool.py', address.replace(' ', '')),
        (1, 'dataset_tool.py', 'convert', f'--source={address}', '--dest', tmp_path / 'e.zip'),
        (2, 'train.py', '--data=x', '--outdir', tmp_path / 'x', f'--resume={address.replace(" ", "")}'),
        (1, 'generate_images.py', f'--net={address.replace("127.0.0.1", "127.0.0.1:x")}', '--outdir', tmp_path / 'p')]
    output = ''
    for status, *command in commands:
        monkeypatch.setattr(sys, 'argv', list(map(str, command)))
        result = click.testing.CliRunner().invoke(script_module(command[0]).main, sys.argv[1:])
        assert result.exit_code == status, (command, result.output)
        output += result.output
    assert server.asked == [('/folder/net.pkl?key=TOKEN&id=signed%20one',
                             'Basic ' + base64.b64encode(b'alice:pass-word').decode())]
    files = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert len(files) > 12
    for place, text in [('output', output.encode()), *((path, content(path) + path.name.encode()) for path in files)]:
        assert not [secret for secret in SECRETS if secret.encode() in text], place
    start = json.loads(content(next(tmp_path.glob('runs/0*')) / 'training_options.json'))
    assert start['transfer'] == server.url and f'--transfer={server.url}' in start['starts'][0]['command']


def test_errors_of_connections_hold_no_secret(server):
    closed = 'http://127.0.0.1:9/net.pkl'
    server.answers = [answer('404 Not Found', 'Content-Length: 0'), answer('302 Found', 'Location: ftp://a?TOKEN')]
    for address in (server.url, server.url, closed, closed.replace(':9', ':port'), 'http://[bad'):
        line = refusal_of(util.hide(with_secrets(address)))
        assert not [secret for secret in SECRETS if secret in line] and 'cannot be downloaded' in line


def refusal_of(address):
    with pytest.raises(UserError) as caught:
        url.download(address)
    return str(caught.value)


# --- Servers that mean harm ----------------------------------------------------------------------


@pytest.mark.parametrize('location, words', [
    ('file:///etc/passwd', 'no web address'), ('ftp://host/x', 'no web address'), ('/folder/net.pkl', 'more than 10 times'),
    ('http://169.254.169.254/latest', 'network segment'), ('http://2852039166/x', 'network segment'),
    ('http://[::ffff:169.254.169.254]/x', 'network segment'), ('http://[fe80::1]/x', 'network segment')])
def test_redirections_that_are_not_followed(server, location, words):
    server.answers = [answer('302 Found', f'Location: {location}', 'Content-Length: 0')] * 20
    assert words in refusal(server.url)


def test_a_redirection_is_followed_and_its_text_is_not_read(server):
    endless = itertools.repeat(b'1000\r\n' + bytes(4096) + b'\r\n')
    server.answers = [answer('302 Found', 'Location: other.pkl?key=TOKEN', 'Transfer-Encoding: chunked', body=endless)]
    assert content(url.download(util.hide(with_secrets(server.url)))) == DATA
    assert [path for path, _ in server.asked][1] == '/folder/other.pkl?key=TOKEN' and server.asked[0][1] == server.asked[1][1]
    with serving() as other:                                     # another host does not get the password
        server.answers = [answer('302 Found', f'Location: {other.url}', 'Content-Length: 0')]
        url.download(util.hide(with_secrets(server.url + '2')))
        assert other.asked == [('/folder/net.pkl', None)]


@pytest.mark.skipif(shutil.which('openssl') is None, reason='makes a certificate')
def test_https_does_not_become_http(server, tmp_path, monkeypatch):
    key, certificate = tmp_path / 'key', tmp_path / 'certificate'
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', key, '-out', certificate, '-days',
                    '2', '-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1'], check=True, capture_output=True)
    certificate.write_bytes(content(key) + content(certificate))
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(certificate))
    with serving(certificate) as safe:
        safe.answers = [answer('301 Moved', f'Location: {server.url}', 'Content-Length: 0')]
        assert 'from https to http' in refusal(safe.url) and not server.asked
        server.answers = [answer('301 Moved', f'Location: {safe.url}', 'Content-Length: 0')]
        assert content(url.download(server.url)) == DATA


@pytest.mark.parametrize('encoding, pack', [('gzip', gzip.compress), ('deflate', zlib.compress),
                                            ('gzip', lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]))])
def test_compressed_answers(server, encoding, pack):
    data = bytes(10**6) + DATA + bytes(10**6)
    packed = pack(data)
    head = '200 OK', f'Content-Encoding: {encoding}'
    server.answers = [answer(*head, f'Content-Length: {len(packed)}', body=packed)]
    assert content(url.download(server.url)) == data
    server.answers = [answer(*head, 'Transfer-Encoding: chunked', body=chunked(packed[:500], packed[500:]))]
    assert content(url.download(server.url + '2')) == data
    cut = chunked(packed[:-1])
    server.answers = [answer(*head, 'Transfer-Encoding: chunked', body=cut)] * url.ATTEMPTS * 2
    assert 'not complete' in refusal(server.url + '3')
    server.answers = [answer(*head, f'Content-Length: {len(packed)}', body=b'?' * len(packed))]
    assert 'damaged' in refusal(server.url + '4')


def test_a_gz_file_stays_as_it_is(server):
    packed = gzip.compress(DATA)
    server.answers = [answer('200 OK', 'Content-Encoding: x-gzip', f'Content-Length: {len(packed)}', body=packed)]
    assert content(url.download(server.url.replace('.pkl', '.tar.gz'))) == packed


def test_a_compressed_answer_does_not_fill_the_disk(server, monkeypatch):
    monkeypatch.setattr(budget, 'MEMORY', 1 << 20)
    packed = gzip.compress(bytes(60 << 20))
    head = '200 OK', f'Content-Length: {len(packed)}'
    server.answers = [answer(*head, 'Content-Encoding: gzip', body=packed), answer(*head, 'Content-Encoding: br', body=packed)]
    assert 'compressed more than' in refusal(server.url) and 'not asked for' in refusal(server.url)
    assert files_of_the_cache() == []


@pytest.mark.parametrize('body', [chunked(DATA, end=b''), chunked(DATA)[:-500_000], chunked(DATA, end=b'xyz\r\n'),
                                  chunked(DATA)[:-1000] + b'0\r\n\r\n'])
def test_a_chunked_answer_without_its_end_is_not_complete(server, body):
    server.tag = None
    server.answers = [answer(*CHUNKED, body=body)] * url.ATTEMPTS * 2
    assert 'was cut' in refusal(server.url)
    server.answers = [answer(*CHUNKED, body=body)]               # the next attempt brings it
    assert content(url.download(server.url)) == DATA


def small_zip() -> bytes:
    """Two files, of which the first is a zip itself."""
    def pack(names):
        file = io.BytesIO()
        with zipfile.ZipFile(file, 'w') as archive:
            for name, data in names.items():
                archive.writestr(name, data)
        return file.getvalue()

    return pack({'inner': pack({'a': DATA[:1000]}), 'b': DATA[:1000]})


@pytest.mark.parametrize('version', ['1.0', '1.1'])
@pytest.mark.parametrize('length', [(), ('Content-Length: many',), ('Content-Length: -5',)])
def test_an_answer_without_a_length_is_taken_only_if_its_end_is_known(server, version, length):
    def serve(data):
        server.answers = [answer('200 OK', *length, body=data, version=version)]

    serve(DATA)
    assert 'does not say how long it is' in refusal(server.url)
    serve(DATA)
    assert content(url.download(server.url + '1', sha256=hashlib.sha256(DATA).hexdigest())) == DATA
    serve(DATA[:-1])
    assert 'instead of' in refusal(server.url + '2', sha256=hashlib.sha256(DATA).hexdigest())
    whole = small_zip()
    inner = whole.index(b'PK\5\6') + 22                         # where the inner one ends
    for data in (whole[:-1], whole[:inner], whole[:500], b'PK'):
        serve(data)
        assert 'does not say how long' in refusal(server.url + '3')
    serve(whole)
    assert content(url.download(server.url + '3')) == whole
    picture = encode_png(np.zeros((8, 8, 3), np.uint8))
    serve(picture[:-1])
    assert 'does not say how long' in refusal(server.url + '4')
    serve(picture)
    assert content(url.download(server.url + '4')) == picture


@pytest.mark.parametrize('large', [False, True])
def test_the_end_of_a_zip_is_known(tmp_path, monkeypatch, large):
    if large:                                                    # as if it had 4 GiB
        monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', 10)
    (tmp_path / 'x').write_bytes(small_zip())
    assert url._has_end(tmp_path / 'x')
    (tmp_path / 'x').write_bytes(small_zip()[:-23] + small_zip()[-22:])
    assert not url._has_end(tmp_path / 'x')


def begin(server):
    """400,000 bytes of a download."""
    server.cuts = [400_000] + [0] * url.ATTEMPTS
    refusal(server.url)
    server.cuts, server.ranges = [], []


@pytest.mark.parametrize('lines', [
    ('Content-Range: bytes 0-{last}/{size}', 'ETag: "one"'), ('Content-Range: bytes {have}-{last}/{more}', 'ETag: "one"'),
    ('Content-Range: bytes {have}-{less}/{size}', 'ETag: "one"'), ('Content-Range: bytes {have}-{last}/{size}', 'ETag: "two"'),
    ('Content-Range: bytes {have}-{last}/*', 'ETag: "one"'), ('Content-Range: nonsense', 'ETag: "one"'), (),
    ('Content-Range: bytes {have}-{last}/{size}', 'ETag: "one"', 'Content-Encoding: gzip')])
def test_a_part_that_does_not_follow_is_not_joined(server, lines):
    begin(server)
    have = os.path.getsize(url.cache_path(server.url) + '.part')
    size = len(DATA)
    lines = [line.format(have=have, last=size - 1, less=size - 2, size=size, more=size + 1) for line in lines]
    body = DATA[::-1][have:]
    server.answers = [answer('206 Partial Content', *lines, f'Content-Length: {len(body)}', body=body)]
    assert content(url.download(server.url)) == DATA
    assert server.ranges == [None]                               # from its start, at once


def test_a_file_that_changes_while_it_is_fetched(server):
    """Its new version has no tag, or the server does not care."""
    begin(server)
    server.data, server.tag = DATA[::-1], None
    assert content(url.download(server.url)) == DATA[::-1]


def test_a_server_that_takes_the_range_of_a_changed_file(server):
    begin(server)
    have = os.path.getsize(url.cache_path(server.url) + '.part')
    new = DATA[::-1] + b'more'
    server.data, server.tag = new, '"two"'
    server.answers = [answer('206 Partial Content', f'Content-Range: bytes {have}-{len(new) - 1}/{len(new)}',
                             f'Content-Length: {len(new) - have}', body=new[have:])]
    assert content(url.download(server.url)) == new


def test_a_length_that_is_a_lie(server):
    server.answers = [answer('200 OK', f'Content-Length: {len(DATA) + 1}', body=DATA)] * url.ATTEMPTS * 2
    assert 'was cut' in refusal(server.url)
    server.answers = [answer('200 OK', f'Content-Length: {len(DATA) - 1}', body=DATA)]
    assert 'instead of' in refusal(server.url, sha256=hashlib.sha256(DATA).hexdigest())
    sent = []
    server.answers = [answer('200 OK', f'Content-Length: {10**15}', body=(sent.append(1) or DATA for _ in range(1000)))]
    assert 'longer than' in refusal(server.url) and len(sent) < 100
    server.answers = [answer('204 No Content')]
    assert 'answers 204' in refusal(server.url)
    assert files_of_the_cache() == []


@pytest.mark.parametrize('lines, block', [(CHUNKED, chunked(DATA, end=b'')), (('200 OK',), DATA)])
def test_an_endless_answer_ends(server, monkeypatch, lines, block):
    monkeypatch.setattr(url, 'LIMIT_OF_UNKNOWN', 20 << 20)
    server.answers = [answer(*lines, body=itertools.repeat(block))]
    assert 'longer than the 20 MiB' in refusal(server.url) and files_of_the_cache() == []


def test_endless_attempts_end(server, monkeypatch):
    """Each brings another file, a little longer than the one before."""
    monkeypatch.setattr(url, 'LIMIT', 10 * len(DATA))
    server.answers = [answer('200 OK', 'Content-Length: 2000000', f'ETag: "{count}"', body=DATA + bytes(count))
                      for count in range(100)]
    assert 'longer than' in refusal(server.url) and len(server.asked) < 20


def slowly(data):
    for byte in data:
        time.sleep(0.05)
        yield bytes([byte])


@pytest.mark.parametrize('slow_head', [True, False])
def test_a_server_that_sends_a_byte_now_and_then(server, monkeypatch, slow_head):
    monkeypatch.setattr(url, 'PATIENCE', 1)
    head = b'HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n'
    server.answers = [lambda handler: [handler.wfile.write(part) for part in itertools.chain(
        slowly(head) if slow_head else [head + b'\r\n'], slowly(bytes(1000)))]]
    start = time.monotonic()
    assert 'bytes came in a second' in refusal(server.url) and time.monotonic() - start < 10


def test_a_server_that_says_nothing(server, monkeypatch):
    monkeypatch.setattr(url, 'TIMEOUT', 0.5)
    server.answers = [lambda handler: time.sleep(3)]
    assert 'nothing came for 0.5 seconds' in refusal(server.url)
