"""A stand-in for the Hub on loopback: what the installed huggingface_hub client asks of it, and nothing else.

Repositories of models with branches and commits, private ones, access tokens; files of more than 1 kB, and all
safetensors and Parquet, go through the Git LFS protocol (basic, and in parts above 512 kB), and are downloaded through
a redirect with ranges, as from a CDN. No Xet: set `HF_HUB_DISABLE_XET=1` in the client.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_someone"
USER = "someone"
PART_SIZE = 1 << 19


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # commit -> path -> SHA-256 of the content
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, str] | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, branch: str, files: dict[str, str], message: str) -> str:
        parent = self.branches.get(branch, "")
        oid = hashlib.sha1(json.dumps([parent, sorted(files.items()), message]).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid


class HubServer(ThreadingHTTPServer):
    """Serves until the `with` block ends.

    Attributes:
        repos: Repository ID to `Repo`.
        blobs: SHA-256 to content, of everything ever uploaded.
        requests: "METHOD path" of every request.
        drop_uploads: So many of the next uploads lose their connection halfway.
        upload_started: Set when half of an upload has arrived, if `hold_uploads` is set; the rest then waits.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.drop_uploads = 0
        self.hold_uploads = False
        self.upload_started = threading.Event()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.released.set()
        self.shutdown()
        self.server_close()

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def content(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self.blobs[self.repos[repo_id].files(revision)[path]]

    def handle_error(self, request, client_address):
        """A client that was killed is no error of the server."""


def _is_lfs(path: str, size: int) -> bool:
    return size > 1024 or path.endswith((".safetensors", ".parquet"))


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _answer(self, status=200, content=None, body=b"", **headers):
        if content is not None:
            body = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status, message, code=None):
        self._answer(status, {"error": message}, **({"X_Error_Code": code} if code else {}), X_Error_Message=message)

    @property
    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _dispatch(self):
        url = urlsplit(self.path)
        self.path_only, self.query = unquote(url.path), parse_qs(url.query)
        self.server.requests.append(f"{self.command} {self.path_only}")
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, self.path_only)
            if self.command in method.split("|") and match:
                handle(self, **match.groupdict())
                return
        self._body()
        self._error(404, f"the stand-in has no {self.command} {self.path_only}")

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo | None:
        """The repository, or None after an error was answered."""
        repo = self.server.repos.get(repo_id)
        if write and not self._authorized:
            self._error(401, "Invalid username or password.")
        elif repo is None or (repo.private and not self._authorized):
            self._error(404 if self._authorized else 401, "Repository not found", "RepoNotFound")
        else:
            return repo
        return None

    def create(self):
        wanted = json.loads(self._body())
        if not self._authorized:
            self._error(401, "Invalid username or password.")
            return
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        address = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repos:
            self._answer(409, {"error": "You already created this model repo", **address})
            return
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        repo = self.server.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": self.server.store(b"*.safetensors filter=lfs\n")}, "initial commit")
        self._answer(200, address)

    def validate_yaml(self):
        content = json.loads(self._body())["content"]
        try:
            match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
            ok = isinstance(yaml.safe_load(match[1]), dict)
        except (yaml.YAMLError, TypeError):
            ok = False
        errors = [] if ok else [{"message": "no valid YAML front matter"}]
        self._answer(200 if ok else 400, {"errors": errors, "warnings": []})

    def branch(self, repo_id, branch):
        self._body()
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return
        if branch in repo.branches:
            self._error(409, "Reference already exists")
            return
        repo.branches[branch] = repo.branches["main"]
        self._answer(200, {})

    def info(self, repo_id, revision="main"):
        repo = self._repo(repo_id)
        if repo is None:
            return
        files = repo.files(revision)
        if files is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        sha = repo.branches.get(revision, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._answer(200, {"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, repo_id, revision):
        repo = self._repo(repo_id)
        if repo is None:
            return
        files = repo.files(revision)
        if files is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        entries = []
        for path, digest in sorted(files.items()):
            size = len(self.server.blobs[digest])
            entry = {"type": "file", "path": path, "size": size, "oid": digest[:40]}
            if _is_lfs(path, size):
                entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
            entries.append(entry)
        self._answer(200, entries)

    def preupload(self, repo_id, revision):
        files = json.loads(self._body())["files"]
        if self._repo(repo_id, write=True) is None:
            return
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_lfs(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._answer(200, {"files": modes})

    def lfs_batch(self, repo_id):
        wanted = json.loads(self._body())
        if self._repo(repo_id, write=True) is None:
            return
        objects = []
        for entry in wanted["objects"]:
            oid, size = entry["oid"], entry["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.server.blobs:
                header = {}
                href = f"{self.server.url}/lfs/{oid}"
                if size > PART_SIZE:
                    count = -(-size // PART_SIZE)
                    header = {str(part): f"{self.server.url}/lfs/{oid}/{part}" for part in range(1, count + 1)}
                    header["chunk_size"] = str(PART_SIZE)
                    href = f"{self.server.url}/lfs/{oid}/complete"
                verify = {"href": f"{self.server.url}/lfs/{oid}/verify", "header": {}}
                answer["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid, part=None):
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length // 2)
        if self.server.hold_uploads:
            self.server.upload_started.set()
            self.server.released.wait()
        if self.server.drop_uploads > 0:
            self.server.drop_uploads -= 1
            self.close_connection = True
            self.connection.close()
            return
        content += self.rfile.read(length - length // 2)
        if part is not None:
            self.server.parts.setdefault(oid, {})[int(part)] = content
            self._answer(200, ETag=f'"{hashlib.md5(content).hexdigest()}"')
        elif hashlib.sha256(content).hexdigest() != oid:
            self._error(400, "the content has another SHA-256")
        else:
            self.server.store(content)
            self._answer(200)

    def lfs_complete(self, oid):
        parts = json.loads(self._body())["parts"]
        received = self.server.parts.pop(oid)
        content = b"".join(received[part["partNumber"]] for part in parts)
        if self.server.store(content) != oid:
            self._error(400, "the parts have another SHA-256")
        else:
            self._answer(200, {})

    def lfs_verify(self, oid):
        wanted = json.loads(self._body())
        there = len(self.server.blobs.get(oid, b"")) == wanted["size"] and oid == wanted["oid"]
        self._answer(200 if there else 404, {})

    def commit(self, repo_id, revision):
        lines = [json.loads(line) for line in self._body().splitlines()]
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return
        if revision not in repo.branches:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        files = dict(repo.files(revision))
        message = ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"]))
            elif key == "lfsFile" and value["oid"] in self.server.blobs:
                files[value["path"]] = value["oid"]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                self._error(400, f"can't commit {line}")
                return
        oid = repo.commit(revision, files, message)
        address = f"{self.server.url}/{repo_id}/commit/{oid}"
        self._answer(200, {"commitUrl": address, "commitOid": oid, "pullRequestUrl": None})

    def resolve(self, repo_id, revision, path):
        repo = self._repo(repo_id)
        if repo is None:
            return
        files = repo.files(revision)
        if files is None or path not in files:
            self._error(404, "not found", "RevisionNotFound" if files is None else "EntryNotFound")
            return
        digest, commit = files[path], repo.branches.get(revision, revision)
        content = self.server.blobs[digest]
        headers = {"X_Repo_Commit": commit, "ETag": f'"{digest[:40]}"'}
        if _is_lfs(path, len(content)):
            headers |= {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": str(len(content))}
            cdn = f"http://localhost:{self.server.server_port}/cdn/{digest}"  # another host, as the real one
            self._answer(302, Location=cdn, **headers)
        else:
            self._answer(200, body=content, **headers)

    def cdn(self, digest):
        content = self.server.blobs[digest]
        start = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if start is None:
            self._answer(200, body=content, ETag=f'"{digest}"', Accept_Ranges="bytes")
            return
        first, last = int(start[1]), int(start[2] or len(content) - 1)
        span = f"bytes {first}-{last}/{len(content)}"
        self._answer(206, body=content[first : last + 1], Content_Range=span, Accept_Ranges="bytes")


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>.+)", _Handler.tree),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w{64})", _Handler.lfs_put),
    ("PUT", r"/lfs/(?P<oid>\w{64})/(?P<part>\d+)", _Handler.lfs_put),
    ("POST", r"/lfs/(?P<oid>\w{64})/complete", _Handler.lfs_complete),
    ("POST", r"/lfs/(?P<oid>\w{64})/verify", _Handler.lfs_verify),
    ("GET|HEAD", r"/cdn/(?P<digest>\w{64})", _Handler.cdn),
    ("GET|HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
