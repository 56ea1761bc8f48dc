"""--download, against a small hub on this machine: what is fetched, what is not, and what is said if it fails."""
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import HERE, small_data

pytest.importorskip("huggingface_hub", reason="--download needs huggingface_hub, which is optional")

ROOT = HERE.parent
COMMIT = "c0ffee" * 6 + "c0ff"
MELD = "datasets/AZYoung/MELD_processed"        # as in TASKS; a model's name has no "datasets/" in front


class Hub(ThreadingHTTPServer):
    """Answers its client's questions about these repositories: {repository: {name: bytes}}."""

    def __init__(self, repositories: dict):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories = repositories
        self.gated = set()              # repositories whose licence is not accepted
        self.breaks_off = set()         # names of files of which only the first half comes
        self.sent = []                  # names of the files that were asked for, but for their headers


class Answer(BaseHTTPRequestHandler):
    """/api/models/REPO/revision/main, /api/models/REPO/tree/COMMIT, /REPO/resolve/COMMIT/NAME."""

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        headers["Content-Length"] = headers.get("Content-Length", len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/")
        for repository, files in self.server.repositories.items():
            api = f"api/{repository}" if repository.startswith("datasets/") else f"api/models/{repository}"
            if path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                return self.answer(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
            if path.startswith(f"{api}/tree/"):
                tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
                return self.answer(200, json.dumps(tree).encode())
            start = f"{repository}/resolve/{COMMIT}/"
            if path.startswith(start):
                return self.send_file(repository, path.removeprefix(start))
        self.answer(401, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def send_file(self, repository: str, name: str):
        if repository in self.server.gated:
            return self.answer(403, X_Error_Code="GatedRepo")
        body = self.server.repositories[repository][name]
        headers = {"ETag": f'"{name.replace("/", "-")}"', "X_Repo_Commit": COMMIT}
        if self.command == "HEAD":
            return self.answer(200, body, **headers)
        self.server.sent.append(name)
        if name in self.server.breaks_off:
            if self.server.sent.count(name) > 1:        # the client tries to get the other half
                return self.answer(503)
            return self.answer(200, body[:len(body) // 2], **headers, **{"Content-Length": len(body)})
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begin > 0:
            headers["Content_Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        self.answer(206 if begin > 0 else 200, body[begin:], **headers)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A few of the demo's rows as MELD, and the demo's backbone with what else published ones hold."""
    def meld(rows):
        for row in rows:
            row["label"] = row["label"].replace("calm", "neutral")
        return rows[:6]

    rows = small_data(tmp_path_factory.mktemp("rows"), meld)
    tiny = {file.name: file.read_bytes() for file in (ROOT / "demo" / "llm").iterdir()}
    others = ["consolidated.safetensors", "original/model.safetensors", "onnx/config.json", "README.md", "pytorch.bin"]
    return {
        MELD: {f"MELD/{file.name.replace('demo', 'meld')}": file.read_bytes() for file in rows.iterdir()},
        "me/tiny": tiny | {name: b"not to be fetched" for name in others},
    }


@pytest.fixture
def hub(repositories):
    hub = Hub(repositories)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def python(tmp_path, port: int, *argv) -> subprocess.CompletedProcess:
    """Run in a process of its own, which knows only this hub."""
    env = {name: value for name, value in os.environ.items()
           if not name.upper().startswith(("HF_", "HUGGING")) and not name.upper().endswith("PROXY")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_fetched_trained_and_left_alone(hub, tmp_path):
    command = [str(ROOT / "train.py"), "--data", "meld", "--llm", "me/tiny", "--download", "--data-dir", ".",
               "--out", "out", "--epochs", "1", "--batch-size", "3", "--device", "cpu"]
    done = python(tmp_path, hub.server_port, *command)
    assert done.returncode == 0, done.stderr
    assert "meld: 6 train, 6 valid, 6 test rows; backbone tiny (llama)" in done.stdout
    assert (tmp_path / "out" / "1111" / "results.json").is_file()
    published = {f"MELD/meld_{split}.pkl" for split in ("train", "valid", "test")}
    assert sorted(hub.sent) == sorted(published | {"config.json", "tokenizer.model", "model.safetensors"})

    hub.sent.clear()
    again = python(tmp_path, hub.server_port, *command)
    assert again.returncode == 0 and "seed 1111: finished before, left alone" in again.stdout
    assert hub.sent == []


FETCH = """
import sys
from support.files import UserError
from support.hub import find_llm
try:
    print(find_llm("me/tiny", fetch=True))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def refusal(tmp_path, port: int) -> str:
    """What is said of a backbone that cannot be fetched."""
    done = python(tmp_path, port, "-c", FETCH)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    told = done.stderr.splitlines()[-1]
    assert told.startswith("error: me/tiny cannot be fetched (")
    return told


def test_a_file_that_breaks_off(hub, repositories, tmp_path):
    hub.breaks_off.add("model.safetensors")
    refusal(tmp_path, hub.server_port)
    hub.breaks_off.clear()
    done = python(tmp_path, hub.server_port, "-c", FETCH)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.strip(), "model.safetensors")
    assert file.read_bytes() == repositories["me/tiny"]["model.safetensors"]


def test_gated_model(hub, tmp_path):
    hub.gated.add("me/tiny")
    assert "accept the licence on its page at the hub, make a token there, run: hf auth login; or by hand: " in refusal(
        tmp_path, hub.server_port)


def test_no_such_model(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "repositories", {})
    assert "check the name; if it is private, run: hf auth login" in refusal(tmp_path, hub.server_port)


def test_no_network(tmp_path):
    with socket.socket() as nobody:         # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        told = refusal(tmp_path, nobody.getsockname()[1])
    assert "check the network and the name" in told
