"""`lathe push`, with huggingface_hub itself, to a server of this machine that takes what it sends.

The library reads its environment when it is imported, so the command runs in child processes.
"""

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from children import asked_of_the_hub
from made_up import make_run

from files.folders import replace_folder
from train.report.card import write_card
from train.report.record import read_record

WEIGHTS = bytes(range(256)) * 8


class FakeHub(BaseHTTPRequestHandler):
    """Enough of the Hub to make a repository and to upload into it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def hub(self) -> Any:
        return self.server

    def reply(self, status: int, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == "old":
            return self.reply(401, {"error": "Invalid token"})
        if path == "/api/whoami-v2":
            return self.reply(200, {"type": "user", "name": "me"})
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        if path.startswith("/storage/"):
            self.hub.stored[path.removeprefix("/storage/")] = body
            return self.reply(200)
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {"upload": {"href": f"{self.hub.endpoint}/storage/"}}
            for one in objects:
                one["actions"] = {"upload": {"href": upload["upload"]["href"] + one["oid"]}}
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        kind, repository = path.startswith("/api/models/"), path.removeprefix("/api/models/")
        name = "/".join(repository.strip("/").split("/")[:2])
        if name not in self.hub.repositories:
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = self.hub.repositories[name]["files"]
        if kind and "/preupload/" in path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": modes})
        if kind and "/commit/" in path:
            return self.commit(body, files, name)
        if kind:
            siblings = [{"rfilename": file} for file in files]
            private = self.hub.repositories[name]["private"]
            return self.reply(
                200, {"id": name, "sha": "1" * 40, "private": private, "siblings": siblings}
            )
        file = path.split("/resolve/main/")[-1].split(f"/resolve/{'1' * 40}/")[-1]
        if file not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit="1" * 40)
        return self.reply(200, files[file], ETag='"tag"', X_Repo_Commit="1" * 40)

    def create(self, asked: dict[str, Any], token: str) -> None:
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if asked["organization"] == "elsewhere":
            return self.reply(403, {"error": "You don't have the rights"})
        if name in self.hub.repositories:
            return self.reply(409, {"error": "exists", "url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = {"private": private, "files": {}}
        return self.reply(200, {"url": url, "name": name, "id": name})

    def commit(self, body: bytes, files: dict[str, bytes], name: str) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                self.hub.messages.append(value["summary"])
        url = f"{self.hub.endpoint}/{name}/commit/{'2' * 40}"
        self.reply(200, {"success": True, "commitUrl": url, "commitOid": "2" * 40})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    server.requests, server.messages, server.stored, server.repositories = [], [], {}, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def finished(folder: Path) -> Path:
    run = make_run(folder, steps=3, valid={})

    def fill(final: Path) -> dict[str, str]:
        (final / "adapter_model.safetensors").write_bytes(WEIGHTS)
        (final / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
        return {}

    replace_folder(run / "final", fill, step=3)
    write_card(read_record(run))
    return run


# Several calls of the command in one child: importing the library takes most of the time.
CHILD = """
import contextlib, io, json, sys
from train.publish.push import main
answers = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def push(endpoint: str, home: Path, calls: list[list[str]], token: str = "good") -> list[Any]:
    """Call the command with each list of arguments; return (exit code, said, complained)."""
    given = {"HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})
    return asked_of_the_hub(CHILD, calls, home, endpoint, **given)


def test_a_run_is_pushed_where_it_is_told_and_only_there(hub: Any, tmp_path: Path) -> None:
    run = finished(tmp_path / "mine")
    hub.repositories["org/public"] = {"private": False, "files": {}}
    hub.repositories["org/theirs"] = {"private": True, "files": {"README.md": b"a card of theirs"}}
    own = (run / "final" / "README.md").read_bytes()
    hub.repositories["org/again"] = {"private": False, "files": {"README.md": own}}
    said = push(
        hub.endpoint,
        tmp_path / "home",
        [
            [str(run), "--to", "org/new", "--private"],
            [str(run)],
            [str(run), "--to", "org/public", "--private"],
            [str(run), "--to", "org/theirs"],
            [str(run), "--to", "org/again"],
            [str(run), "--to", "elsewhere/x"],
        ],
    )
    assert [code for code, _, _ in said] == [0, 0, 2, 0, 0, 2], said
    names = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    for name in ("org/new", "me/mine", "org/again"):
        assert set(hub.repositories[name]["files"]) == names
        assert hub.repositories[name]["files"]["adapter_model.safetensors"] == WEIGHTS
    assert hub.repositories["org/new"]["private"] and not hub.repositories["me/mine"]["private"]
    assert hub.messages[0] == "mine, step 3"
    assert re.match(
        rf"pushed 3 files \(.*\) of {run}/final to .*/org/new \(private\)\n", said[0][1]
    )
    assert "names the base by a folder of this machine, /home/me/base" in said[0][2]
    assert said[1][1].endswith(f"{hub.endpoint}/me/mine (public)\n")
    assert "is there already, and everybody can see it; nothing was uploaded" in said[2][2]
    assert hub.repositories["org/public"]["files"] == {}
    assert hub.repositories["org/theirs"]["files"]["README.md"] == b"a card of theirs"
    assert "adapter_config.json" in hub.repositories["org/theirs"]["files"]
    assert "is not ours, and stays" in said[3][1]
    assert "elsewhere/x: the token may not write there" in said[5][2]


def test_what_cannot_be_pushed_is_refused_in_one_sentence(hub: Any, tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    odd = finished(tmp_path / "a run's name")
    running = make_run(tmp_path / "running", steps=2, valid={}, state="preempted")
    damaged = finished(tmp_path / "damaged")
    (damaged / "final" / "adapter_config.json").write_text("{}")
    before = len(hub.requests)
    calls = {
        "is not finished (preempted": [str(running), "--to", "org/a"],
        "sha256 mismatch; what is damaged is not pushed": [str(damaged), "--to", "org/a"],
        "(it is OWNER/NAME)": [str(run), "--to", "name"],
        "it is OWNER/NAME)": [str(run), "--to", "a/b/c"],
        "no name of a repository on the Hub (Cannot have -- or ..": [str(run), "--to", "a/b--c"],
        "no such folder": [str(tmp_path / "none")],
    }
    said = push(hub.endpoint, tmp_path / "home", list(calls.values()))
    for sentence, (code, out, complained) in zip(calls, said, strict=True):
        assert (code, out, complained.count("\n")) == (2, "", 1), complained
        assert complained.startswith("error: ") and sentence in complained
    assert len(hub.requests) == before  # nobody was asked
    ((code, _, complained),) = push(hub.endpoint, tmp_path / "home", [[str(odd)]])
    assert code == 2 and "give another with --to OWNER/NAME" in complained
    ((code, _, complained),) = push(hub.endpoint, tmp_path / "home", [[str(run)]], token="old")
    assert (code, complained.count("\n")) == (2, 1) and "does not take the token" in complained


def test_without_a_token_nobody_is_asked(hub: Any, tmp_path: Path) -> None:
    run, before = finished(tmp_path / "run"), len(hub.requests)
    asked = [[str(run), "--to", "org/x"]]
    ((code, _, complained),) = push(hub.endpoint, tmp_path / "home", asked, token="")
    assert code == 2 and "there is no token of the Hub: set HF_TOKEN" in complained
    assert len(hub.requests) == before


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    asked = [[str(run), "--to", "org/x"]]
    ((code, out, complained),) = push("http://127.0.0.1:9", tmp_path / "home", asked)
    assert (code, out) == (2, "") and "org/x: could not be pushed (" in complained
    assert "Traceback" not in complained
