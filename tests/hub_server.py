# SPDX-License-Identifier: Apache-2.0
"""
A server that speaks as much of the Hub's protocol as huggingface_hub needs to upload and to
download a model, by HTTP and Git LFS.

Errors are those of the Hub: 401 without a token, 403 without a right, 404 with an error code.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from urllib.parse import unquote, urlsplit

import yaml

USERS = {"hf_of_alice": "alice", "hf_of_bob": "bob"}
"""Users by their tokens"""

_LARGE = (".safetensors", "tokenizer.json")
_FRONT_MATTER = re.compile(r"^---\n(.*?)\n---\n", re.S)
_REPO = r"/(?P<repo>[\w.-]+/[\w.-]+)"


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """
    :param branches: commits of a branch, the newest last; a commit is its files
    """

    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})

    def files(self, revision: str) -> dict[str, bytes] | None:
        for branch, commits in self.branches.items():
            if revision == branch:
                return commits[-1]
            for number, files in enumerate(commits):
                if revision == self.sha(branch, number):
                    return files
        return None

    @staticmethod
    def sha(branch: str, number: int) -> str:
        return hashlib.sha1(f"{branch} {number}".encode()).hexdigest()

    def sha_of(self, revision: str) -> str:
        if revision in self.branches:
            return self.sha(revision, len(self.branches[revision]) - 1)
        return revision


class Hub(ThreadingHTTPServer):
    """
    :ivar repos: by their ids
    :ivar blobs: uploaded files by SHA-256
    :ivar uploads: how often a file arrived whole, by SHA-256
    :ivar requests: all paths asked for, with their methods
    :ivar failures: uploads to answer with 503
    :ivar held: size of the files whose upload is not answered before `released` is set
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()
        self.requests: list[str] = []
        self.failures = 0
        self.held: int | None = None
        self.released = Event()
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Context with a server of its own"""
    hub = Hub()
    Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """Routes requests to the methods below"""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
        for method, pattern, function in ROUTES:
            if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                return function(self, **match.groupdict())
        return self.reply(404, {"error": f"no such path: {path}"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def reply(self, status: int, content, **headers: str):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers.setdefault("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return USERS.get(token)

    def may_write(self, repo: str) -> bool:
        """Whether the user may; answers if not"""
        if self.user is None:
            self.reply(401, {"error": "Invalid username or password."})
        elif not repo.startswith(f"{self.user}/"):
            self.reply(403, {"error": "You don't have the rights to create a model there"})
        else:
            return True
        return False

    def find(self, repo: str, revision: str = "main") -> tuple[Repo, dict[str, bytes]] | None:
        """Find a repository and its files; answers if there is none that the user may see"""
        found = self.server.repos.get(repo)
        if found is None or (found.private and not repo.startswith(f"{self.user}/")):
            status = 404 if self.user else 401
            self.reply(status, {"error": "Not found"}, X_Error_Code="RepoNotFound")
            return None
        if (files := found.files(revision)) is None:
            self.reply(404, {"error": "Not found"}, X_Error_Code="RevisionNotFound")
            return None
        return found, files

    # ---- repositories ----------------------------------------------------------------------

    def validate(self):
        match = _FRONT_MATTER.match(json.loads(self.body)["content"])
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return self.reply(400, {"errors": [{"message": str(error)}], "warnings": []})
        wrong = [
            {"message": f'"{key}" must be a string'}
            for key in ("license", "pipeline_tag", "library_name")
            if not isinstance(data.get(key, ""), str)
        ]
        return self.reply(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def create(self):
        data = json.loads(self.body)
        repo = f"{data.get('organization') or self.user}/{data['name']}"
        if not self.may_write(repo):
            return
        if repo in self.server.repos:
            url = f"{self.server.url}/{repo}"
            return self.reply(409, {"error": "You already created this model repo", "url": url})
        visibility = data.get("visibility", "private" if data.get("private") else "public")
        self.server.repos[repo] = Repo(private=visibility == "private")
        self.reply(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": "0"})

    def info(self, repo: str, revision: str | None = None):
        if found := self.find(repo, revision or "main"):
            self.reply(
                200,
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": found[0].sha_of(revision or "main"),
                    "private": found[0].private,
                    "siblings": [{"rfilename": name} for name in found[1]],
                },
            )

    def unknown(self, name: str):
        """A model without a user, of which there are none"""
        self.reply(404, {"error": "Not found"}, X_Error_Code="RepoNotFound")

    def branch(self, repo: str, revision: str):
        if not self.may_write(repo) or not (found := self.find(repo)):
            return
        if revision in found[0].branches:
            return self.reply(409, {"error": "Reference already exists"})
        found[0].branches[revision] = [found[0].branches["main"][-1]]
        self.reply(200, {})

    def tree(self, repo: str, revision: str):
        if not (found := self.find(repo, revision)):
            return
        entries = []
        for name, content in found[1].items():
            entry = {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": git_oid(content),
            }
            if name.endswith(_LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.reply(200, entries)

    # ---- uploads ---------------------------------------------------------------------------

    def preupload(self, repo: str, revision: str):
        if not self.may_write(repo) or not (found := self.find(repo, revision)):
            return
        modes = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            there = found[1].get(name)
            is_large = name.endswith(_LARGE)
            # of large files: SHA-256
            oid = hashlib.sha256(there).hexdigest() if there and is_large else None
            oid = git_oid(there) if there and not is_large else oid
            mode = "lfs" if is_large else "regular"
            modes.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": modes})

    def batch(self, repo: str):
        if not self.may_write(repo):
            return
        objects = []
        for one in json.loads(self.body)["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.url}/upload/{one['oid']}"}
                verify = {"href": f"{self.server.url}/verify/{one['oid']}"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str):
        with self.server.lock:
            fails = self.server.failures > 0
            self.server.failures -= fails
        if fails:
            return self.reply(503, {"error": "Service Unavailable"})
        if len(self.body) == self.server.held:
            self.server.released.wait()
        assert hashlib.sha256(self.body).hexdigest() == oid
        with self.server.lock:
            self.server.blobs[oid] = self.body
            self.server.uploads[oid] += 1
        self.reply(200, {})

    def verify(self, oid: str):
        data = json.loads(self.body)
        is_there = len(self.server.blobs.get(oid, b"")) == data["size"]
        self.reply(200 if is_there else 404, {})

    def commit(self, repo: str, revision: str):
        if not self.may_write(repo) or not (found := self.find(repo, revision)):
            return
        files = dict(found[1])
        for line in self.body.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        found[0].branches[revision].append(files)
        sha = found[0].sha_of(revision)
        url = f"{self.server.url}/{repo}/commit/{sha}"
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # ---- downloads -------------------------------------------------------------------------

    def resolve(self, repo: str, revision: str, name: str):
        if not (found := self.find(repo, revision)):
            return
        if name not in found[1]:
            return self.reply(404, {"error": "Not found"}, X_Error_Code="EntryNotFound")
        content = found[1][name]
        etag = git_oid(content)
        if name.endswith(_LARGE):
            etag = hashlib.sha256(content).hexdigest()
        self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=found[0].sha_of(revision))


_API = f"/api/models{_REPO}"
_REVISION = r"/(?P<revision>[^/]+)"
ROUTES = [
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", "/api/repos/create", Handler.create),
    ("GET", _API, Handler.info),
    ("GET", r"/api/models/(?P<name>[\w.-]+)", Handler.unknown),
    ("GET", f"{_API}/revision{_REVISION}", Handler.info),
    ("GET", f"{_API}/tree{_REVISION}", Handler.tree),
    ("POST", f"{_API}/branch{_REVISION}", Handler.branch),
    ("POST", f"{_API}/preupload{_REVISION}", Handler.preupload),
    ("POST", f"{_API}/commit{_REVISION}", Handler.commit),
    ("POST", rf"{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/upload/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("POST", "/verify/(?P<oid>[0-9a-f]{64})", Handler.verify),
    ("GET|HEAD", rf"{_REPO}/resolve{_REVISION}/(?P<name>.+)", Handler.resolve),
]
