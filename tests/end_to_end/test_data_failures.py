"""What a run makes of data that are not what they were, and of a storage that does not answer."""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from muybridge.data.index import ClipIndex
from muybridge.tests.patience import PATIENCE


def test_latents_that_changed_end_the_run_with_64(
    tiny_run: list[str], toy_folder: Path, tmp_path: Path, muybridge: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    shutil.copytree(toy_folder / "latents", tmp_path / "latents")
    index = ClipIndex.open(tmp_path / "latents" / "train")
    clip = index.clip(3)
    data = bytearray(index.shards[clip.shard].read_bytes())
    data[clip.offset + clip.size - 1] ^= 1
    index.shards[clip.shard].write_bytes(data)
    answer = muybridge(
        "train", *tiny_run, f"data.latents={tmp_path / 'latents'}", f"run_dir={tmp_path / 'run'}", "deepspeed=zero0"
    )
    assert answer.returncode == 64
    message = answer.stderr.splitlines()[-1]
    assert message.startswith(f"muybridge: dataset changed under the run: {index.shards[clip.shard]}, clip {clip.key}:")
    assert "Traceback" not in answer.stderr


class UnavailableClip(ThreadingHTTPServer):
    """Serves the shards of a folder, all but the bytes from `offset` on of one of them."""

    def __init__(self, folder: Path, shard: str, offset: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                data = (folder / self.path.lstrip("/")).read_bytes()
                missing = self.path == f"/{shard}" and first == offset
                self.send_response(503 if missing else 206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                self.send_header("Content-Length", "0" if missing else str(last + 1 - first))
                self.end_headers()
                self.wfile.write(b"" if missing else data[first : last + 1])

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing on the terminal."""

        super().__init__(("127.0.0.1", 0), Handler)


def test_a_storage_that_does_not_answer_one_rank_ends_the_run_with_75(
    tiny_run: list[str],
    toy_folder: Path,
    tmp_path: Path,
    launcher: Callable[[int], list[str]],
    command_env: dict[str, str],
) -> None:
    source = toy_folder / "shards" / "train"
    clip = ClipIndex.open(source).clip(3)
    manifest = json.loads((source / "manifest.json").read_text())
    shard = manifest["shards"][clip.shard]["name"]
    shutil.copytree(source, tmp_path / "clips", ignore=shutil.ignore_patterns("*.tar"))
    own = [f"data.path={tmp_path / 'clips'}", "data.access=raw", "data.workers=0", f"run_dir={tmp_path / 'run'}"]
    with UnavailableClip(source, shard, clip.offset) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for entry in manifest["shards"]:
            entry["name"] = f"http://127.0.0.1:{server.server_port}/{entry['name']}"
        (tmp_path / "clips" / "manifest.json").write_text(json.dumps(manifest))
        run = [*launcher(2), "-m", "muybridge.train", *tiny_run, *own, "deepspeed=zero1"]
        answer = subprocess.run(
            run,
            capture_output=True,
            text=True,
            check=False,
            env={**command_env, "no_proxy": "*"},
            timeout=100 * PATIENCE,
        )
        server.shutdown()
    assert (
        "cannot be read after 5 attempts: status 503; the same command goes on from the last checkpoint"
        in answer.stderr
    )
    assert "exitcode  : 75" in answer.stderr
