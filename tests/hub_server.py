"""A small Hugging Face Hub on the loopback interface, for tests that upload and download with the real huggingface_hub,
transformers and datasets. Nothing in them is replaced; they only have another address.

Repositories live in memory, where a test can look at what arrived. Requests can be made to fail, and all are logged.
A test uses the fixture `hub`. This process reaches it by `HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)`; another process
gets `env=hub.environment(WRITE_TOKEN)`.

It answers the requests that the tests make. Any other one gets status 501.
"""

import base64
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import pytest
import yaml
from huggingface_hub import constants


WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN = "write-token", "read-token", "other-token"
LARGE_SUFFIXES = (".arrow", ".bin", ".npy", ".npz", ".onnx", ".parquet", ".pt", ".safetensors", ".zip")
LARGE_SIZE = 10 * 2**20

API = "/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
PAGE = "/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
REVISION = "(?P<revision>refs/[^/]+/[^/]+|[^/]+)"
ROUTES = []


class User(NamedTuple):
    name: str
    role: str


class Request(NamedTuple):
    method: str
    path: str
    status: int  # 0: the connection was cut instead


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping = {}


class Refused(Exception):
    def __init__(self, status, message, code=None, headers=None, **content):
        super().__init__(message)
        headers = {"X-Error-Message": message.encode("ascii", "replace").decode(), **(headers or {})}
        headers |= {"X-Error-Code": code} if code else {}
        self.answer = Answer(status, json.dumps({"error": message, **content}).encode(), headers)


class LargeFile(bytes):
    """Content that came by the large file protocol."""


class Commit(NamedTuple):
    oid: str
    title: str
    files: Mapping[str, bytes]


@dataclass
class Repo:
    name: str
    private: bool = False
    refs: dict[str, Commit] = field(default_factory=dict)  # branches by name, pull requests as refs/pr/1
    commits: dict[str, Commit] = field(default_factory=dict)
    large_files: dict[str, LargeFile] = field(default_factory=dict)

    def allows(self, user):
        return user is not None and user.name == self.name.split("/")[0]

    def resolve(self, revision):
        if revision not in self.refs and revision not in self.commits:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return self.refs.get(revision) or self.commits[revision]

    def commit(self, ref, files, title="Commit"):
        """Make `files`, all of them, the content of `ref`."""
        oid = hashlib.sha1(f"{self.name} {len(self.commits)} {title}".encode()).hexdigest()
        self.refs[ref] = self.commits[oid] = Commit(oid, title, dict(files))
        return self.refs[ref]


@dataclass
class Faults:
    """What goes wrong: nothing, until a test sets `hub.faults = Faults(...)`, which counts from 1 again.

    unavailable_every: one in so many write requests (POST, PUT) is answered with 503, in HTML like load balancers do.
    cut_uploads: number of an upload (the PUT of a large file, the POST of a commit) → when its connection is cut:
        "half" of the body read, or at the "answer", when the Hub has acted on it.
    only: a regular expression; requests with other paths are not counted.
    """

    unavailable_every: int = 0
    cut_uploads: Mapping[int, str] = field(default_factory=dict)
    only: str = ""
    writes: int = 0
    uploads: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def strike(self, method, path):
        if method not in ("POST", "PUT") or not re.search(self.only, path):
            return None
        upload = method == "PUT" or "/commit/" in path
        with self.lock:
            self.writes += 1
            self.uploads += upload
            if every := self.unavailable_every:
                # Another one in each round. Otherwise a try of just so many requests would fail however often it is made.
                rounds, place = divmod(self.writes - 1, every)
                if (rounds + place + 1) % every == 0:
                    return "unavailable"
            return self.cut_uploads.get(self.uploads) if upload else None


class Hub(ThreadingHTTPServer):
    """`repos` maps ("model", "alice/name") to what is there; `tokens` has two of alice's and one of bob's."""

    request_queue_size = 64  # clients connect from several threads at once

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.folder = folder
        self.tokens = {WRITE_TOKEN: User("alice", "write"), READ_TOKEN: User("alice", "read")}
        self.tokens[OTHER_TOKEN] = User("bob", "write")
        self.repos = {}
        self.requests = []
        self.faults = Faults()
        self.lock = threading.RLock()

    def environment(self, token=None, **settings):
        """All environment variables of a process that uses this Hub, with an empty cache of its own."""
        hidden = ("HF_", "HUGGING", "TRANSFORMERS_")
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith(hidden)},
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": tempfile.mkdtemp(prefix="hf-home-", dir=self.folder),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
            **settings,
        }

    def create(self, name, kind="model", **options):
        """A repository with a first commit on "main"."""
        repo = self.repos[kind, name] = Repo(name, **options)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES)
        repo.commit("main", {".gitattributes": attributes.encode()}, "initial commit")
        return repo

    def files(self, name, kind="model", revision="main"):
        """path → content, without the .gitattributes that every repository is created with."""
        files = self.repos[kind, name].resolve(revision).files
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def open(self, user, kind, name, write=False, propose=False):
        """The repository, if the user may see it, change it, or propose changes by pull request."""
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and not repo.allows(user)):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user.role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if write and not (propose or repo.allows(user)):
            raise Refused(403, "Forbidden: pass create_pr=1 as a query parameter to create a Pull Request")
        return repo

    def answer(self, request, path):
        try:
            for methods, pattern, function in ROUTES:
                if request.command in methods and (match := pattern.fullmatch(path)):
                    parts = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    if "kind" in parts:
                        parts["kind"] = parts["kind"].removesuffix("s") or "model"
                    with self.lock:
                        found = function(self, request, **parts)
                    return found if isinstance(found, Answer) else Answer(200, json.dumps(found, default=str).encode())
            raise Refused(501, "This is not in tests/hub_server.py.")
        except Refused as refused:
            return refused.answer
        except Exception as error:
            return Refused(500, f"tests/hub_server.py failed: {error!r}").answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def serve(self):
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        length = int(self.headers.get("Content-Length", 0))
        fault = self.server.faults.strike(self.command, path)
        self.body = self.rfile.read(length // 2 if fault == "half" else length)
        if fault == "unavailable":
            answer = Answer(503, b"<html><h1>503 Service Unavailable</h1></html>", {"Content-Type": "text/html"})
        elif fault != "half":
            answer = self.server.answer(self, path)
        self.close_connection = fault in ("half", "answer")
        status = 0 if self.close_connection else answer.status
        self.server.requests.append(Request(self.command, self.path, status))
        if status == 0:
            return
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(answer.body), **answer.headers}
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    @property
    def user(self):
        """Who asks; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.tokens.get(token)

    @property
    def json(self):
        return json.loads(self.body)

    def log_message(self, *arguments):
        pass


def route(methods, pattern):
    def add(function):
        ROUTES.append((methods.split(), re.compile(pattern), function))
        return function

    return add


@route("POST", "/api/repos/create")
def create_repo(hub, request):
    user, wanted = request.user, request.json
    owner, kind = wanted.get("organization") or user.name, wanted.get("type") or "model"
    if user != (owner, "write"):
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
    name = f"{owner}/{wanted['name']}"
    if (kind, name) in hub.repos:
        raise Refused(409, f"You already created this {kind} repo", url=url(hub, kind, name))
    hub.create(name, kind, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return {"name": name, "url": url(hub, kind, name)}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request):
    empty = not card_data(request.json["content"])
    return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}] if empty else []}


@route("GET", f"{API}(?:/revision/{REVISION})?")
def repo_info(hub, request, kind, name, revision):
    repo = hub.open(request.user, kind, name)
    oid, _, files = repo.resolve(revision or "main")
    card = card_data(files.get("README.md", b"").decode())
    info = {"id": name, "author": name.split("/")[0], "sha": oid, "cardData": card, "private": repo.private}
    info |= {"gated": False, "disabled": False, "tags": card.get("tags") or [], "downloads": 0, "likes": 0}
    if kind == "model":
        library = card.get("library_name") or ("transformers" if "config.json" in files else None)
        info |= {"modelId": name, "pipeline_tag": card.get("pipeline_tag"), "library_name": library}
    return info | {"siblings": [{"rfilename": path} for path in sorted(files)]}


@route("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?")
def tree(hub, request, kind, name, revision, path):
    commit = hub.open(request.user, kind, name).resolve(revision)
    prefix = f"{path}/" if path else ""
    found = [entry for entry in entries(commit) if entry["path"].startswith(prefix)]
    if path and not found:
        raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
    recursive = request.query.get("recursive") == ["true"]
    return [entry for entry in found if recursive or "/" not in entry["path"].removeprefix(prefix)]


@route("POST", f"{API}/branch/{REVISION}")
def create_branch(hub, request, kind, name, revision):
    repo = hub.open(request.user, kind, name, write=True)
    if revision in repo.refs:
        raise Refused(409, "Reference already exists")
    repo.refs[revision] = repo.resolve(request.json.get("startingPoint", "main"))
    return {}


@route("POST", f"{API}/preupload/{REVISION}")
def preupload(hub, request, kind, name, revision):
    repo = hub.open(request.user, kind, name, write=True, propose="create_pr" in request.query)
    present = repo.resolve(revision).files
    answers = []
    for file in request.json["files"]:
        path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
        large = binary or file["size"] >= LARGE_SIZE or path.endswith(LARGE_SUFFIXES)
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append(answer | {"oid": etag(present[path]) if path in present else None})
    return {"files": answers}


@route("POST", f"{PAGE}.git/info/lfs/objects/batch")
def large_file_batch(hub, request, kind, name):
    # The clients leave the revision out when they are about to open a pull request.
    repo = hub.open(request.user, kind, name, write=True, propose="ref" not in request.json)
    answers = [{"oid": file["oid"], "size": file["size"]} for file in request.json["objects"]]
    for answer in answers:
        if answer["oid"] not in repo.large_files:
            action = {"href": f"{hub.endpoint}/storage/{kind}/{name}/{answer['oid']}"}
            answer["actions"] = {"upload": action, "verify": action}
    return {"transfer": "basic", "objects": answers}


@route("PUT POST", "/storage/(?P<kind>[^/]+)/(?P<name>.+)/(?P<oid>[0-9a-f]{64})")
def large_file_storage(hub, request, kind, name, oid):
    """PUT stores; it has no token, because the storage is not the Hub's own. POST verifies what was stored."""
    files = hub.repos[kind, name].large_files
    if request.command == "PUT":
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, "The content does not have the announced SHA-256.")
        files[oid] = LargeFile(request.body)
    elif oid not in files or len(files[oid]) != request.json["size"]:
        raise Refused(404, "The file was not uploaded.")
    return {}


@route("POST", f"{API}/commit/{REVISION}")
def commit(hub, request, kind, name, revision):
    propose = "create_pr" in request.query
    repo = hub.open(request.user, kind, name, write=True, propose=propose)
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    files = dict(repo.refs[revision].files)
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in repo.large_files:
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = repo.large_files[value["oid"]]
        elif files.pop(path, None) is None:  # deletedFile
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
    new = repo.commit(f"refs/pr/{number}" if propose else revision, files, header["value"]["summary"])
    page = url(hub, kind, name)
    answer = {"success": True, "commitOid": new.oid, "commitUrl": f"{page}/commit/{new.oid}"}
    return answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if propose else {})


@route("GET HEAD", f"{PAGE}/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub, request, kind, name, revision, path):
    repo = hub.open(request.user, kind, name)
    commit = repo.resolve(revision)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:
        raise Refused(404, "Entry not found", "EntryNotFound", headers)
    content, size = commit.files[path], len(commit.files[path])
    headers |= {"ETag": f'"{etag(content)}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if isinstance(content, LargeFile):
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": size}
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if part is None:
        return Answer(200, content, headers)
    start, stop = int(part[1]), min(int(part[2] or size) + 1, size)
    return Answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def url(hub, kind, name):
    return f"{hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"


def card_data(text):
    """The YAML at the top of a README."""
    block = re.match(r"\s*---\s*?\n(.*?)\n---\s*?(\n|$)", text, re.DOTALL)
    return (yaml.safe_load(block[1]) if block else None) or {}


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(content):
    return hashlib.sha256(content).hexdigest() if isinstance(content, LargeFile) else git_blob(content)


def blob(content):
    """Size and hashes of a file, as listings have them."""
    if not isinstance(content, LargeFile):
        return {"size": len(content), "oid": git_blob(content)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{etag(content)}\nsize {len(content)}\n".encode()
    lfs = {"oid": etag(content), "size": len(content), "pointerSize": len(pointer)}
    return {"size": len(content), "oid": git_blob(pointer), "lfs": lfs}


def entries(commit):
    """Every folder and file of a commit."""
    folders = {str(folder) for path in commit.files for folder in PurePosixPath(path).parents} - {"."}
    found = [
        {"type": "directory", "path": path, "size": 0, "oid": git_blob(path.encode())} for path in sorted(folders)
    ]
    found += [{"type": "file", "path": path, **blob(content)} for path, content in sorted(commit.files.items())]
    return found


@pytest.fixture(name="hub")
def run_hub(tmp_path, monkeypatch):
    # Otherwise clients in this process follow the settings of the user who runs the tests.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Hub(tmp_path) as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield hub
        hub.shutdown()
    assert not [request for request in hub.requests if request.status == 500]
