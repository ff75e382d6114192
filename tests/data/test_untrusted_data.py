"""What data of others cannot do: name other files, addresses and commands, run code, or read keys from a decoder's environment."""

from __future__ import annotations

import io
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from muybridge.data import decode_decord, decode_pyav, storage, web, workers
from muybridge.data.decode import DecodeError, Decoder, has_decoder
from muybridge.data.indexing import IndexSettings, build_index
from muybridge.data.mp4 import write_mp4
from muybridge.data.storage import file_facts, find_shards, open_stream, read_range
from muybridge.data.stream_samples import StreamSample, read_shard
from muybridge.tests.data.video_files import encode, plain
from muybridge.tests.data.web_server import serving, tar_of

KEYS = ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN")


class Server(ThreadingHTTPServer):
    """Serves one tar by ranges under any name; a name below "to/" is a redirect to the rest of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.data = b""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = self.server.data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.server.data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server()
    with serving(found, monkeypatch):
        yield found


def playlists(clip: Path, url: str) -> dict[str, str]:
    """Texts that FFmpeg takes for videos by what they begin with, and that name a file, an address or a port."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    sdp = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S" '
        'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{url}/c.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>'
    )
    return {
        "a list of files": f"ffconcat version 1.0\nfile '{clip}'\n",
        "a file": hls.format(clip),
        "an address": hls.format(f"{url}/a.ts"),
        "a list of lists": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}/b.m3u8\n",
        "a manifest": dash,
        "a port": sdp,
    }


DECODERS = [
    pytest.param(
        module, id=name, marks=pytest.mark.skipif(not has_decoder(Decoder(name)), reason=f"{name} is not installed")
    )
    for name, module in (("pyav", decode_pyav), ("decord", decode_decord))
]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_playlist_is_no_video(decoder: Any, server: Server, tmp_path: Path) -> None:
    (clip := tmp_path / "secret.mp4").write_bytes(plain())
    for text in playlists(clip, server.url).values():
        with pytest.raises(DecodeError, match=r"^not a readable video file: it does not begin as mp4, "):
            decoder.probe(text.encode())
    assert not server.requests


@pytest.mark.skipif(not has_decoder(Decoder.pyav), reason="PyAV is not installed")
def test_ffmpeg_itself_takes_a_file_for_nothing_else(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a playlist begin as a video does: PyAV has FFmpeg leave such formats out."""
    monkeypatch.setattr(decode_pyav, "check_container", lambda _: None)
    (clip := tmp_path / "secret.mp4").write_bytes(plain())
    for name, text in playlists(clip, server.url).items():
        # Invalid data are those that FFmpeg knows by the name's ending only.
        reason = "Invalid argument" if name in ("a list of files", "a port") else "Invalid (argument|data)"
        with pytest.raises(DecodeError, match=f"^not a readable video file: {reason}"):
            decode_pyav.probe(text.encode())
    assert not server.requests
    for container, codec in (("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mpegts", "libx264")):
        assert decode_pyav.probe(encode(5, container=container, codec=codec))[0].frames == 5


RUNNABLE = [
    *("a.pyd", "a.pkl", "a.pickle", "a.pth", "a.pt", "a.npy", "a.npz", "a.cbor", "a.ten", "a.so", "a.py", "a.sh"),
    *("../../a.mp4.py", "/etc/cron.d/a"),
]


def test_members_that_could_run_code_are_passed_over(tmp_path: Path) -> None:
    """webdataset's own decoders would unpickle most of them."""
    code = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    members = {"a.mp4": plain(), "a.txt": b"a dog", **dict.fromkeys(RUNNABLE, code)}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    [sample] = list(read_shard(str(tmp_path / "a.tar")))
    assert isinstance(sample, StreamSample)
    assert (sample.data, sample.captions) == (plain(), ["a dog"])
    index, _ = build_index(
        str(tmp_path / "a.tar"), tmp_path / "out", settings=IndexSettings(), workers=1, timeout_seconds=30.0
    )
    assert [index.captions(row) for row in range(len(index))] == [["a dog"]]
    assert not (tmp_path / "ran").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "out"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("pipe://cat /etc/passwd", "pipe:// is not read"),
        ("file:///etc/passwd", "file:// is not read"),
        ("ftp://host/a.tar", "ftp:// is not read"),
        ("ssh://host/a.tar", "ssh:// is not read"),
        ("github://owner:repo@main/a.tar", "github:// is not read"),
        ("s3://bucket/a.zip::file:///etc/passwd", "a chain of file systems"),
        ("https://user:hunter22hunter@host/a.tar", "has a user's name or password in it"),
        ("https://hunter22hunter@host/a.tar?b=@c", r"https://\.\.\.@host has a user's name or password in it"),
    ],
)
def test_other_urls_are_refused_before_they_are_opened(url: str, reason: str) -> None:
    for refuse in (find_shards, file_facts, open_stream, lambda name: read_range(name, 0, 1)):
        with pytest.raises(ValueError, match=reason) as caught:
            refuse(url)
        assert "hunter22" not in str(caught.value)


def test_names_that_other_loaders_run_or_expand_are_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"nowhere={tmp_path}")
    (tmp_path / "a.tar").write_bytes(tar_of({"a.txt": b"x"}))
    for name in (f"pipe:touch {tmp_path}/ran", "hf:user/set/a.tar", "nowhere/a.tar", f"$HOME/{tmp_path}/a.tar", "-"):
        with pytest.raises(FileNotFoundError):
            open_stream(name)
    assert not (tmp_path / "ran").exists()


def test_a_redirect_keeps_to_the_rules(server: Server) -> None:
    server.data = b"0123456789"
    assert read_range(f"{server.url}/to/{server.url}/a.tar", 2, 3) == b"234"
    for target, reason in (
        ("file:///etc/passwd", "status 302"),
        ("s3://bucket/a", "status 302"),
        ("ftp://host/a", "redirect is not followed: ftp:// is not read"),
        ("http://user:hunter22hunter@host/a", "redirect is not followed: .* has a user's name or password in it"),
    ):
        server.requests.clear()
        with pytest.raises(OSError, match=reason) as caught:
            read_range(f"{server.url}/to/{target}", 0, 1)
        assert not isinstance(caught.value, storage.TransientReadError)
        assert len(server.requests) == 1  # it is not tried again


class Connection:
    """A connection as it is once it leads somewhere."""

    def __init__(self, address: str) -> None:
        self.sock, self.address, self.closed = self, address, False

    def getpeername(self) -> tuple[str, int]:
        return self.address, 80

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("address", "must_be_public", "is_read"),
    [
        ("169.254.169.254", False, False),  # where the clouds' machines get their keys
        ("fe80::1%eth0", False, False),
        ("fd00:ec2::254", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("10.0.0.7", False, True),
        ("10.0.0.7", True, False),
        ("127.0.0.1", True, False),
        ("93.184.216.34", True, True),
    ],
)
def test_an_address_is_looked_at_before_anything_is_asked(address: str, must_be_public: bool, is_read: bool) -> None:
    request: Any = web.urllib.request.Request("http://host/a.tar")
    request.must_be_public = must_be_public
    connection: Any = Connection(address)
    if is_read:
        web._check_peer(connection, request)
    else:
        with pytest.raises(PermissionError, match=r"^http://host/a\.tar may not be read: "):
            web._check_peer(connection, request)
    assert connection.closed is not is_read


def test_a_redirect_from_a_public_server_must_stay_outside() -> None:
    request: Any = web.urllib.request.Request("https://host/a.tar")
    request.peer_is_private = False
    headers: Any = {}
    follow = web._Redirects().redirect_request
    new = follow(request, io.BytesIO(), 302, "", headers, "https://other/a.tar")
    assert getattr(new, "must_be_public", None) is True
    with pytest.raises(PermissionError, match="from https to http"):
        follow(request, io.BytesIO(), 302, "", headers, "http://host/a.tar")


def test_a_connection_is_looked_at(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above is one that real requests go through, and what it refuses is not asked for, once or again."""
    monkeypatch.setattr(web, "_METADATA", (web.ip_address("127.0.0.1"),))
    with pytest.raises(PermissionError, match="an address where machines keep their own keys"):
        read_range(f"{server.url}/a.tar", 0, 1)
    assert not server.requests


def test_decoders_have_no_keys_and_leave_no_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.setenv(name, "canary-0123456789")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:canary-0123456789@proxy")
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    with workers.WorkerPool(1, timeout_seconds=60.0) as pool:
        pool.submit("synthesize", seed=0, split="train", number=0).result()
        [process] = pool._processes
        assert process.pid is not None
        decoder = psutil.Process(process.pid)
        environment = decoder.environ()
        assert decoder.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert environment["OMP_PROC_BIND"] == "false"
    assert not [name for name, value in environment.items() if "canary" in value]


@pytest.mark.skipif(not has_decoder(Decoder.pyav), reason="PyAV is not installed")
def test_remote_shards_are_indexed_without_keys_in_the_decoders(server: Server, tmp_path: Path) -> None:
    file = io.BytesIO()
    write_mp4(file, np.zeros((4, 32, 32, 3), dtype=np.uint8), fps=8)
    server.data = tar_of({"a.mp4": file.getvalue(), "a.txt": b"a dog"})
    index, _ = build_index(
        f"{server.url}/a.tar", tmp_path / "out", settings=IndexSettings(), workers=1, timeout_seconds=30.0
    )
    assert (len(index), index.column("frames")[0]) == (1, 4)
