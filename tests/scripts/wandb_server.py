"""A small stand-in for W&B's server: what its client asks when it hands over a run, over HTTP on this machine."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Keeps the lines of each run's files as W&B does: by the offset that the client names."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, dict[str, dict[int, str]]] = {}  # by run and file: the lines by their numbers
        self.refuses = False  # every login
        self._lock = threading.Lock()

    def history(self, run_id: str) -> list[dict[str, Any]]:
        lines = self.files.get(run_id, {}).get("wandb-history.jsonl", {})
        return [json.loads(line) for _, line in sorted(lines.items())]

    def answer_query(self, query: dict[str, Any]) -> dict[str, Any]:
        variables = query["variables"]
        match query["operationName"]:
            case "RunResumeStatus":
                return {"model": {**_PROJECT, "bucket": self._bucket(variables["name"])}}
            case "UpsertBucket":
                is_new = variables["name"] not in self.files
                self.files.setdefault(variables["name"], {})
                bucket = {**(self._bucket(variables["name"]) or {}), "project": _PROJECT}
                return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def take_lines(self, run_id: str, parts: dict[str, Any]) -> None:
        with self._lock:
            for name, part in parts.items():
                lines = self.files.setdefault(run_id, {}).setdefault(name, {})
                for number, line in enumerate(part["content"], start=part["offset"]):
                    lines[number] = line

    def _bucket(self, run_id: str) -> dict[str, Any] | None:
        if run_id not in self.files:
            return None
        history = [line for _, line in sorted(self.files[run_id].get("wandb-history.jsonl", {}).items())]
        return {
            "id": "1",
            "name": run_id,
            "displayName": run_id,
            "config": "{}",
            "wandbConfig": "{}",
            "tags": [],
            "summaryMetrics": history[-1] if history else "{}",
            "historyTail": json.dumps(history[-1:]),
            "historyLineCount": len(history),
            "eventsTail": "[]",
            "eventsLineCount": 0,
            "logLineCount": 0,
        }


_PROJECT = {"id": "2", "name": "muybridge", "entity": {"id": "3", "name": "someone"}}


@contextmanager
def serve_wandb() -> Iterator[WandbServer]:
    """The server at its `url` for as long as the context lasts."""
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                answer = {"data": state.answer_query(json.loads(data))}
            elif self.path.endswith("/file_stream"):
                state.take_lines(self.path.split("/")[-2], json.loads(data).get("files") or {})
            body = json.dumps(answer).encode()
            self.send_response(401 if state.refuses else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = answer

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client leaves without a word
                super().handle()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
