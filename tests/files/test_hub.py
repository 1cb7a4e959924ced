"""The Hub, spoken to for real, on a server of this machine that answers as the Hub does.

huggingface_hub reads its environment when it is imported, so the calls are made in child processes,
a few calls in each.
"""

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import asked_of_the_hub

from files.errors import UserError
from files.hub import (
    ModelSource,
    choose_weights,
    hashed_weights,
    read_index,
    resolve_config,
    resolve_model,
)
from models.weights import weights_files

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = bytes(range(256)) * 8
CONFIG = b'{"model_type": "llama"}'
SHARDS = {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "x.safetensors"}})


def parquet(columns: dict[str, list[str]]) -> bytes:
    """Return a table as a Parquet file."""
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


REPOSITORIES: dict[str, dict[str, bytes]] = {
    "models/org/good": {
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"pickle",
        "additional_chat_templates/tool_use.jinja": b"tools",
        "README.md": b"words",
        "onnx/model.onnx": b"other",
    },
    "models/org/sharded": {
        "config.json": CONFIG,
        "model.safetensors.index.json": json.dumps(
            {"weight_map": dict(zip("ab", SHARDS, strict=True))}
        ).encode(),
        **SHARDS,
    },
    "models/org/gap": {
        "config.json": CONFIG,
        "model.safetensors.index.json": INDEX.encode(),
        **SHARDS,
    },
    "models/org/odd": {
        "config.json": CONFIG,
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "pytorch_model-1.safetensors", "b": "weights-b.safetensors"}}
        ).encode(),
        "pytorch_model-1.safetensors": b"one",
        "weights-b.safetensors": b"two",
        "consolidated.safetensors": b"the same once more",
        "adapter_model.safetensors": b"another matter",
    },
    "models/org/alone": {"config.json": CONFIG, "weights.safetensors": WEIGHTS},
    "models/org/several": {
        "config.json": CONFIG,
        "a.safetensors": WEIGHTS,
        "b.safetensors": WEIGHTS,
    },
    "models/org/no-index": {
        "config.json": CONFIG,
        "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}',
        **SHARDS,
    },
    "models/org/pickled": {"config.json": CONFIG, "pytorch_model.bin": b"pickle"},
    "models/org/empty": {"config.json": CONFIG},
    "models/org/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
    "models/org/gated": {"config.json": CONFIG, "model.safetensors": WEIGHTS},
    "models/org/closed": {"config.json": CONFIG},
    "models/org/broken": {"config.json": CONFIG, "model.safetensors": WEIGHTS},
    "models/org/damaged": {"config.json": CONFIG, "model.safetensors": WEIGHTS},
    "models/org/dropped": {"config.json": CONFIG, "model.safetensors": WEIGHTS},
    "models/org/short": {"config.json": CONFIG, "model.safetensors": WEIGHTS},
    "models/org/lost": {"config.json": CONFIG, "model.safetensors": WEIGHTS},
    "models/org/forbidden": {"config.json": CONFIG, "model.safetensors": WEIGHTS},
    "datasets/org/rows": {
        "README.md": b"words",
        "data/train-00000-of-00002.jsonl": b'{"text": "a"}\n',
        "data/train-00001-of-00002.jsonl": b'{"text": "b"}\n',
        "data/test-00000-of-00001.jsonl": b'{"text": "c"}\n',
    },
    "datasets/org/archive": {"README.md": b"words", "rows.tar": b"packed"},
    # Its branch refs/convert/parquet, which the Hub writes.
    "datasets/org/archive-converted": {"default/train/0000.parquet": parquet({"text": ["d", "e"]})},
}


def commit_of(repository: str) -> str:
    return hashlib.sha1(repository.encode()).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub(BaseHTTPRequestHandler):
    """Enough of the Hub's interface for listing and fetching; every request is noted."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def drop(self, content: bytes, tag: str, commit: str) -> None:
        """Promise the whole content, send half of it, and hang up."""
        self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def requests(self) -> list[str]:
        return self.server.requests  # pyright: ignore

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        converted = commit_of("datasets/org/archive-converted")
        if "refs/convert/parquet" in path or converted in path:
            path = path.replace("refs/convert/parquet", converted)
            path = path.replace("org/archive", "org/archive-converted")
        self.requests().append(f"{self.command} {path}")
        if path.startswith("api/"):
            self.answer_api(path.removeprefix("api/"))
        else:
            self.answer_file(path if path.startswith("datasets/") else f"models/{path}")

    def answer_api(self, path: str) -> None:
        kind, owner, name, *rest = path.split("/")
        repository = f"{kind}/{owner}/{name}"
        if repository not in REPOSITORIES:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if repository == "models/org/closed":
            return self.reply(401, X_Error_Code="GatedRepo")
        if rest[1:] and rest[1] not in ("main", commit_of(repository)):
            return self.reply(404, X_Error_Code="RevisionNotFound")
        files = []
        for file_name, content in REPOSITORIES[repository].items():
            entry: dict = {"size": len(content)}
            if is_large(file_name):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content)}
                entry["lfs"]["pointerSize"] = 134
            if rest and rest[0] == "tree":
                files.append(entry | {"type": "file", "path": file_name, "oid": blob_id(content)})
            else:
                files.append(entry | {"rfilename": file_name, "blobId": blob_id(content)})
        answer = (
            files
            if rest and rest[0] == "tree"
            else {"id": f"{owner}/{name}", "sha": commit_of(repository), "siblings": files}
        )
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    def answer_file(self, path: str) -> None:
        kind, owner, name, _, _, *parts = path.split("/")
        repository, file_name = f"{kind}/{owner}/{name}", "/".join(parts)
        if repository == "models/org/gated":
            return self.reply(403, X_Error_Code="GatedRepo")
        if repository == "models/org/broken" and is_large(file_name):
            return self.reply(507)
        if repository == "models/org/lost" and is_large(file_name):
            return self.reply(404, X_Error_Code="EntryNotFound")
        if repository == "models/org/forbidden" and is_large(file_name):
            return self.reply(403)
        content = REPOSITORIES[repository][file_name]
        tag = hashlib.sha256(content).hexdigest() if is_large(file_name) else blob_id(content)
        transfer = f"GET {path.removeprefix('models/')}"
        if "damaged" in path and is_large(file_name) and self.requests().count(transfer) == 1:
            content = content[:-1] + b"!"
        if "short" in path and is_large(file_name):
            content = content[:-100]
        if "dropped" in path and is_large(file_name) and self.command == "GET":
            return self.drop(content, f'"{tag}"', commit_of(repository))
        self.reply(200, content, ETag=f'"{tag}"', X_Repo_Commit=commit_of(repository))


CHILD = """
import json, sys, time
from files.errors import UserError
from files import hub
from data.source import read_rows
time.sleep = lambda seconds: None  # a fake Hub need not be waited for
answers = []
for function, arguments in json.load(sys.stdin):
    try:
        if function == "rows":
            answers.append([[row.values, row.where] for row in read_rows(**arguments)])
        else:
            source = getattr(hub, function)(**arguments)
            folder = getattr(source, "folder", source)
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
            answers.append({"names": names, "commit": getattr(source, "commit", None),
                            "repository": getattr(source, "repository", None),
                            "folder": str(folder)})
    except UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(home: Path, endpoint: str, calls: list, **environment: str) -> list:
    """Make the calls in a child process; return, for each, what it found or its sentence."""
    return asked_of_the_hub(CHILD, calls, home, endpoint, **environment)


class Hub:
    """The running server and the answers of one child that asked it everything."""

    endpoint: str
    requests: list[str]
    home: Path


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.requests = []  # pyright: ignore
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    running = Hub()
    running.endpoint = f"http://127.0.0.1:{server.server_port}"
    running.requests = server.requests  # pyright: ignore
    running.home = tmp_path_factory.mktemp("hub")
    yield running
    server.shutdown()
    server.server_close()
    thread.join()


def model(path: str, **arguments: object) -> list:
    return ["resolve_model", {"path": path, **arguments}]


@pytest.fixture(scope="module")
def online(hub: Hub) -> dict[str, object]:
    calls = {
        "config first": ["resolve_config", {"path": "org/good"}],
        "good": model("org/good"),
        "by commit": model("org/good", revision=commit_of("models/org/good")),
        "sharded": model("org/sharded"),
        "gap": model("org/gap"),
        "odd": model("org/odd"),
        "alone": model("org/alone"),
        "several": model("org/several"),
        "no index": model("org/no-index"),
        "pickled": model("org/pickled"),
        "pickled, weights not needed": model("org/pickled", weights=False),
        "empty": model("org/empty"),
        "adapter": model("org/adapter"),
        "unknown": model("org/goood"),
        "gated": model("org/gated"),
        "closed": model("org/closed"),
        "revision": model("org/good", revision="no-such-branch"),
        "broken": model("org/broken"),
        "damaged": model("org/damaged"),
        "fetched again": model("org/damaged"),
        "dropped": model("org/dropped"),
        "short": model("org/short"),
        "lost": model("org/lost"),
        "forbidden": model("org/forbidden"),
        "train rows": ["rows", {"spec": "hub:org/rows:train"}],
        "converted rows": ["rows", {"spec": "hub:org/archive:train"}],
    }
    return dict(zip(calls, ask(hub.home, hub.endpoint, list(calls.values())), strict=True))


def test_a_repository_becomes_local_files_and_a_commit(online: dict) -> None:
    small = ["README.md", "additional_chat_templates/tool_use.jinja", "config.json"]
    small.append("tokenizer.json")
    assert online["config first"]["names"] == small
    good = online["good"]
    assert good["names"] == sorted([*small, "model.safetensors"])  # no pickle
    assert good["commit"] == commit_of("models/org/good")
    assert good["repository"] == "org/good"
    assert (Path(good["folder"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert online["by commit"]["folder"] == good["folder"]
    assert set(SHARDS) < set(online["sharded"]["names"])


def test_the_index_decides_what_is_fetched_whatever_the_names(hub: Hub, online: dict) -> None:
    assert online["odd"]["names"] == [
        "config.json",
        "model.safetensors.index.json",
        "pytorch_model-1.safetensors",
        "weights-b.safetensors",
    ]
    assert online["odd"]["commit"] == commit_of("models/org/odd")
    assert not any("consolidated" in request for request in hub.requests)
    assert online["alone"]["names"] == ["config.json", "weights.safetensors"]
    # What cannot be loaded is known before anything large is on its way.
    for name in ("gap", "several", "no-index"):
        asked = [request for request in hub.requests if f"org/{name}/" in request]
        assert not any(request.endswith(".safetensors") for request in asked)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("gap", "x.safetensors is missing, 1 of the 2 files that model.safetensors.index.json"),
        ("several", "has a.safetensors, b.safetensors but no model.safetensors.index.json"),
        ("no index", "names '../x.safetensors'; it must be a plain *.safetensors file name"),
        ("pickled", "only pickle weights found (pytorch_model.bin)"),
        ("pickled", "convert to safetensors first"),
        ("empty", "holds no weights"),
        ("adapter", "holds an adapter, not a model"),
        ("unknown", "no such folder (looked in "),
        ("unknown", "not found on the Hub, or private; did you mean 'org/good'?"),
        ("unknown", "pass a folder as model.path=/path/to/folder"),
        ("gated", "/org/gated, then set HF_TOKEN or run 'hf auth login', or pass a folder"),
        ("closed", "accept the licence at http"),
        ("revision", "has no revision 'no-such-branch'"),
        ("broken", "a file could not be fetched (HTTP 507); what has arrived is kept in"),
        ("damaged", "model.safetensors: arrived damaged"),
        ("dropped", "a file could not be fetched"),
        ("dropped", "so run once more, or pass a folder as model.path=/path/to/folder"),
        ("short", "model.safetensors: arrived damaged"),
        ("lost", "model.path='org/lost': a file could not be fetched (HTTP 404)"),
        ("forbidden", "the Hub refused access (HTTP 403); set HF_TOKEN"),
    ],
)
def test_a_refusal_is_one_sentence_with_its_remedy(online: dict, case: str, words: str) -> None:
    assert words in online[case]
    assert "\n" not in online[case]


def test_pickle_only_does_not_matter_where_no_weights_are_needed(online: dict) -> None:
    assert online["pickled, weights not needed"]["names"] == ["config.json"]


def test_a_damaged_file_is_gone_from_the_cache_and_fetched_again(online: dict) -> None:
    assert (Path(online["fetched again"]["folder"]) / "model.safetensors").read_bytes() == WEIGHTS


def test_no_pickle_is_fetched(hub: Hub, online: dict) -> None:
    assert any(request.endswith("model.safetensors") for request in hub.requests)
    assert not any(request.endswith(".bin") for request in hub.requests)


def test_rows_of_a_data_set_come_from_the_files_of_its_split(hub: Hub, online: dict) -> None:
    folder = "hub:org/rows/data"
    assert online["train rows"] == [
        [{"text": "a"}, f"{folder}/train-00000-of-00002.jsonl:1"],
        [{"text": "b"}, f"{folder}/train-00001-of-00002.jsonl:1"],
    ]
    assert not any("test-00000" in request for request in hub.requests)  # none in vain


def test_rows_of_another_form_come_as_the_hub_converted_them(hub: Hub, online: dict) -> None:
    where = "hub:org/archive/default/train/0000.parquet"
    rows = [[{"text": "d"}, f"{where}:1"], [{"text": "e"}, f"{where}:2"]]
    assert online["converted rows"] == rows
    again = [["rows", {"spec": "hub:org/archive:train"}]]
    assert ask(hub.home, hub.endpoint, again, HF_HUB_OFFLINE="1") == [rows]


def test_the_cache_serves_without_a_network(hub: Hub, online: dict) -> None:
    before = len(hub.requests)
    offline = ask(
        hub.home,
        hub.endpoint,
        [
            model("org/good"),
            ["rows", {"spec": "hub:org/rows:train"}],
            model("org/goods"),
            model("org/pickled"),
            ["rows", {"spec": "hub:org/other"}],
            model("org/odd"),
            model("org/sharded"),
        ],
        HF_HUB_OFFLINE="1",
    )
    assert len(hub.requests) == before
    assert offline[0] == online["good"]
    assert offline[1] == online["train rows"]
    assert offline[5] == online["odd"]
    assert offline[6] == online["sharded"]
    assert "cannot be reached (HF_HUB_OFFLINE is set)" in offline[2]
    assert "no copy in the cache; did you mean 'org/good'?" in offline[2]
    assert "judged by the copy in the cache" in offline[3]
    assert "data.train=/path/to/rows.jsonl" in offline[4]


def test_a_hub_out_of_reach_says_how_to_use_a_folder(tmp_path: Path, hub: Hub) -> None:
    silent = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    port = silent.server_port
    silent.server_close()  # nobody listens here now
    [sentence] = ask(tmp_path, f"http://127.0.0.1:{port}", [model("org/good")])
    assert re.search(r"^model.path='org/good': no such folder .*cannot be reached", sentence)
    assert "no copy in the cache; pass a folder as model.path=/path/to/folder" in sentence
    assert "\n" not in sentence


def test_half_a_data_set_in_the_cache_is_not_taken_for_the_whole(tmp_path: Path, hub: Hub) -> None:
    call = ["rows", {"spec": "hub:org/rows:train"}]
    ask(tmp_path, hub.endpoint, [call])
    [part] = tmp_path.rglob("train-00001-of-00002.jsonl")
    part.unlink()
    [sentence] = ask(tmp_path, hub.endpoint, [call], HF_HUB_OFFLINE="1")
    assert "incomplete (1 of 2 files data/train-*.jsonl)" in sentence


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    assert resolve_config(tmp_path) == tmp_path
    with pytest.raises(UserError, match="holds no weights"):
        resolve_model(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="convert to safetensors first"):
        resolve_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(str(tmp_path)) == ModelSource(tmp_path, None, None)


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-00002.safetensors",),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("a.safetensors", "b.safetensors"),
    ],
)
def test_several_files_without_an_index_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"has {names[0]}.* but no model\.safetensors\.index"):
        resolve_model(tmp_path)


INDEX_OF_A_AND_B = json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})


@pytest.mark.parametrize(
    ("names", "index", "chosen"),
    [
        (["model.safetensors"], None, ["model.safetensors"]),
        (["weights.safetensors"], None, ["weights.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], None, ["model.safetensors"]),
        (["weights.safetensors", "optimizer.safetensors"], None, ["weights.safetensors"]),
        (
            ["a.safetensors", "b.safetensors", "model.safetensors", "model-00001-of-00009.x"],
            INDEX_OF_A_AND_B,
            ["a.safetensors", "b.safetensors"],
        ),
        # Shards that were joined into one file, and an index that was forgotten.
        (["a.safetensors", "model.safetensors"], INDEX_OF_A_AND_B, ["model.safetensors"]),
    ],
)
def test_which_files_hold_a_models_weights(
    names: list[str], index: str | None, chosen: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    for name in names:
        (tmp_path / name).touch()
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    assert resolve_model(tmp_path) == ModelSource(tmp_path, None, None)
    read = read_index(tmp_path) if index is not None else None
    assert choose_weights(names, "x", read) == chosen
    assert weights_files(tmp_path) == [tmp_path / name for name in chosen]


def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match=r"no such folder .* did you mean 'models'"):
        resolve_model(tmp_path / "model")
    for path in ("./missing", "~/missing-folder-of-lathe", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            resolve_model(path)
    (tmp_path / "config.json").write_bytes(CONFIG)
    with pytest.raises(UserError, match="is a file; pass the folder"):
        resolve_model(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(tmp_path / "models")


def test_damage_in_the_cache_is_noticed_by_the_name_of_the_blob(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    assert hashed_weights([snapshot / "model.safetensors"]) == {"model.safetensors": digest}
    (blobs / digest).write_bytes(b"Weights")
    with pytest.raises(UserError, match=r"was damaged in the Hub's cache.*fetch it again"):
        hashed_weights([snapshot / "model.safetensors"])


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"weight_map": {"a": ["x"]}}', '{"weight_map": 1}', '{"weight_map": null}'],
)
def test_an_index_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: "):
        resolve_model(tmp_path)
