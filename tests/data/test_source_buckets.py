"""s3:// and gs:// against servers on this machine: what is read, and what breaks on the way.

The servers are in the extra `test-remote`; without it these tests are skipped.
"""

import http.client
import multiprocessing
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from source_files import documents, flat, write_megatron, write_nanoset

from megastage.data.sources.base import SourceError, SourceOptions, open_source

NEEDS = "needs the extra test-remote: pip install -e .[test-remote]"
DOCS = documents(3, 20, low=2, high=12)
KEY, SECRET = "right-key", "right-secret"


class Between(ThreadingHTTPServer):
    """Stands between client and server: refuses other keys, breaks off bodies, and runs something between requests.

    break_off: how many objects x.ds* of more than 1000 bytes are still to end early; before_get: called with each path.
    """

    daemon_threads = True

    def __init__(self, port):
        self.port, self.break_off, self.before_get = port, 0, None
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self):
        between = self.server
        if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
            content = b"<Error><Code>InvalidAccessKeyId</Code><Message>unknown key</Message></Error>"
            return self._answer(403, [("Content-Type", "application/xml")], content)
        if between.before_get is not None and self.command == "GET":
            between.before_get(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        connection = http.client.HTTPConnection("127.0.0.1", between.port)
        connection.request(self.command, self.path, self.rfile.read(length), dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("content-length", "connection")]
        connection.close()
        if between.break_off and "/x.ds" in self.path and len(content) > 1000:
            between.break_off -= 1
            self._answer(answer.status, headers, content[:500], claimed=len(content))
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        if self.command == "HEAD":
            return self._answer(answer.status, headers, b"", claimed=int(answer.getheader("Content-Length") or 0))
        return self._answer(answer.status, headers, content)

    def _answer(self, status, headers, content, claimed=None):
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if claimed is None else claimed))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = _pass_on

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def bucket():
    """(client, proxy) of an S3 server with the bucket `data`."""
    for name in ("moto", "s3fs", "flask", "boto3"):
        pytest.importorskip(name, reason=NEEDS)
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id=KEY, aws_secret_access_key=SECRET,
    )  # fmt: skip
    client.create_bucket(Bucket="data")
    between = Between(port)
    yield client, between
    between.shutdown()
    server.stop()


@pytest.fixture
def s3(bucket, monkeypatch, tmp_path):
    """(client, proxy, options), with the proxy as the machine's s3."""
    import fsspec

    client, between = bucket
    between.break_off, between.before_get = 0, None
    settings = {"endpoint_url": between.url, "key": KEY, "secret": SECRET}
    settings["config_kwargs"] = {"retries": {"max_attempts": 0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    return client, between, SourceOptions(cache_folder=tmp_path / "cache")


def upload(client, folder, name):
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            client.put_object(Bucket="data", Key=f"{name}/{file.relative_to(folder)}", Body=file.read_bytes())


def tokens(source):
    return source.read(0, source.n_tokens).tolist()


def built(options):
    return sorted(path.name.split("-")[0] for path in options.cache_folder.glob("*"))


def test_folders_and_prefixes_of_a_bucket(s3, tmp_path):
    client, _, options = s3
    write_nanoset(tmp_path / "n", "x", DOCS)
    (tmp_path / "m").mkdir()
    write_megatron(tmp_path / "m" / "x", DOCS)
    for name in ("n", "m"):
        upload(client, tmp_path / name, f"one/{name}")
    for kind, url, local in (("nanoset", "s3://data/one/n", "n"), ("megatron", "s3://data/one/m/x", "m/x")):
        far, near = open_source(kind, url, options), open_source(kind, tmp_path / local)
        assert tokens(far) == flat(DOCS)
        assert far.fingerprint == near.fingerprint
    with pytest.raises(SourceError, match="s3://data/one/none: no such file or folder"):
        open_source("nanoset", "s3://data/one/none", options)
    assert built(options) == ["remote", "remote"]


def test_a_connection_that_breaks_off_never_gives_half_a_file(s3, tmp_path, monkeypatch):
    import s3fs

    client, between, options = s3
    docs = documents(4, 400, low=2, high=30)
    write_nanoset(tmp_path / "n", "x", docs)
    upload(client, tmp_path / "n", "three")
    monkeypatch.setattr(s3fs.core.S3FileSystem, "retries", 2)
    between.break_off = 1000
    with pytest.raises(SourceError, match=r"s3://data/three: data/three/x.ds\S* (cannot be fetched|came with)"):
        open_source("nanoset", "s3://data/three", options)
    assert built(options) == []
    between.break_off = 0
    assert tokens(open_source("nanoset", "s3://data/three", options)) == flat(docs)


def test_wrong_credentials_are_an_error_that_names_the_url(s3, monkeypatch):
    import fsspec

    client, between, options = s3
    client.put_object(Bucket="data", Key="four/x.ds", Body=b"1234")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": between.url, "key": "wrong", "secret": "wrong"})
    with pytest.raises(SourceError, match=r"s3://data/four: cannot be listed .*check address, credentials") as error:
        open_source("nanoset", "s3://data/four", options)
    assert SECRET not in str(error.value)
    assert not options.cache_folder.exists()


def test_a_server_that_is_not_there_is_an_error_that_names_the_url(s3, monkeypatch):
    import fsspec
    import s3fs

    _, _, options = s3
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        settings = {"endpoint_url": f"http://127.0.0.1:{unused.getsockname()[1]}", "key": KEY, "secret": SECRET}
        settings["config_kwargs"] = {"retries": {"max_attempts": 0}}
        monkeypatch.setitem(fsspec.config.conf, "s3", settings)
        monkeypatch.setattr(s3fs.core.S3FileSystem, "retries", 1)
        with pytest.raises(SourceError, match="s3://data/five: cannot be listed"):
            open_source("nanoset", "s3://data/five", options)


def test_objects_that_change_are_fetched_again_and_never_mixed(s3, tmp_path):
    client, between, options = s3
    write_nanoset(tmp_path / "old", "x", DOCS)
    changed = [[token + 1 for token in doc] for doc in DOCS]  # the same sizes
    write_nanoset(tmp_path / "new", "x", changed)
    upload(client, tmp_path / "old", "six")

    def replace(path):
        if path.endswith("x.ds.metadata"):  # the last file, when the tokens have come already
            between.before_get = None
            upload(client, tmp_path / "new", "six")

    between.before_get = replace
    with pytest.raises(SourceError, match="s3://data/six: its files changed while they were being fetched"):
        open_source("nanoset", "s3://data/six", options)
    assert built(options) == []
    assert tokens(open_source("nanoset", "s3://data/six", options)) == flat(changed)
    upload(client, tmp_path / "old", "six")
    assert tokens(open_source("nanoset", "s3://data/six", options)) == flat(DOCS)


def _rank(url, settings, cache, gate, results):
    import fsspec

    fsspec.config.conf["s3"] = settings
    gate.wait()
    source = open_source("nanoset", url, SourceOptions(cache_folder=cache))
    results.put(source.fingerprint)


def test_two_ranks_fetch_into_one_cache_at_once(s3, tmp_path):
    import fsspec

    client, _, options = s3
    docs = documents(5, 4000, low=2, high=40)
    local = open_source("nanoset", write_nanoset(tmp_path / "n", "x", docs))
    upload(client, tmp_path / "n", "seven")
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(2), context.Queue()
    arguments = ("s3://data/seven", fsspec.config.conf["s3"], options.cache_folder, gate, results)
    ranks = [context.Process(target=_rank, args=arguments) for _ in range(2)]
    for rank in ranks:
        rank.start()
    found = {results.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert found == {local.fingerprint}
    assert built(options) == ["remote"]
    assert not list(options.cache_folder.glob(".*"))


def test_a_bucket_of_google_storage(tmp_path, monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else it asks by gRPC, which emulators lack
    for name in ("gcp_storage_emulator", "gcsfs"):
        pytest.importorskip(name, reason=NEEDS)
    import gcsfs
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="data")
    server.start()
    try:
        port = server._api._httpd.socket.getsockname()[1]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        write_nanoset(tmp_path / "n", "x", DOCS)
        store = gcsfs.GCSFileSystem(token="anon")
        for file in (tmp_path / "n").iterdir():
            store.pipe(f"data/n/{file.name}", file.read_bytes())
        options = SourceOptions(cache_folder=tmp_path / "cache")
        assert tokens(open_source("nanoset", "gs://data/n", options)) == flat(DOCS)
        with pytest.raises(SourceError, match="gs://data/none: no such file or folder"):
            open_source("nanoset", "gs://data/none", options)
    finally:
        server.stop()
