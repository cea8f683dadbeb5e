"""A Hugging Face Hub on this machine: the routes that pushing and loading a model use, and faults on request.

    with LoopbackHub() as hub:
        hub.faults.append(Fault("PUT", "/_blobs/", cut_after=1000, times=1))
        ...  # a client whose HF_ENDPOINT is hub.endpoint
        hub.files("tester/model")["config.json"]

Written from what huggingface_hub sends: https://huggingface.co/docs/hub/api, and the batch protocol of Git LFS. All of
it lives in memory. A client must not use Xet (HF_HUB_DISABLE_XET=1), the Hub's other protocol for large files.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
READ_ONLY_TOKEN = "hf_only_reads"
USER = "tester"
TEAM = "team"
PULL_REQUEST = "refs/pr/"
LARGE = (".safetensors", ".model", ".png")


def is_large(path: str) -> bool:
    """Whether the Hub keeps a file as a blob of Git LFS."""
    return path.endswith(LARGE)


def content_hash(path: str, data: bytes) -> str:
    """What the Hub tells a file's content by: git's hash, or that of LFS."""
    if is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What goes wrong with the requests of one kind.

    method, path: the requests, by the beginning of their path. times: how many of them; the later ones go well.
    status: the answer, an error; or cut_after: after so many bytes of the request's body, or with `of_answer` of the
    answer's, the connection is closed.
    """

    method: str
    path: str
    status: int | None = None
    message: str = ""
    cut_after: int | None = None
    of_answer: bool = False
    times: int = 10**9

    def strikes(self, method: str, path: str) -> bool:
        """Whether it applies to this request; each time counts."""
        if not self.times or method != self.method or not path.startswith(self.path):
            return False
        self.times -= 1
        return True


@dataclass
class Repository:
    """Commits are whole file trees, by hash; branches point to commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], title: str) -> str:
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        sha = hashlib.sha1(repr((len(self.commits), content)).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.titles.append(title)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class HubError(Exception):
    """An answer that is an error. code: the word that huggingface_hub tells errors apart by."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class LoopbackHub:
    """The server, in a thread of this process, while the `with` block lasts.

    endpoint: its address. repositories: by name. blobs: large files that arrived whole, by SHA-256. requests: method,
    path and body of every request, in order, as far as it was received.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bytes]] = []
        self.faults: list[Fault] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, without those that the Hub puts there itself."""
        repository = self.repositories[name]
        files = repository.commits[repository.resolve(revision)]
        return {path: data for path, data in files.items() if path != ".gitattributes"}

    def received(self, method: str, path: str) -> list[int]:
        """Bytes received by each request of a kind."""
        return [len(body) for kind, where, body in self.requests if kind == method and where.startswith(path)]


class Handler(BaseHTTPRequestHandler):
    """One connection. `ROUTES`, below, says which method answers what."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    def answer_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = next((fault for fault in self.hub.faults if fault.strikes(self.command, path)), None)
        cut_request = fault is not None and fault.cut_after is not None and not fault.of_answer
        self.body = self.read_body(fault.cut_after if cut_request else None)
        self.hub.requests.append((self.command, path, self.body))
        self.answer_cut = fault.cut_after if fault is not None and fault.of_answer else None
        if cut_request:
            self.close_connection = True
            return
        try:
            if fault is not None and fault.status is not None:
                raise HubError(fault.status, fault.message)
            self.find_route(path)()
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message} if error.code else {}
            self.reply({"error": error.message}, status=error.status, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer_request

    def log_message(self, *arguments) -> None:
        pass

    def read_body(self, limit: int | None) -> bytes:
        """The body, or as much of it as a fault lets through."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length if limit is None else min(length, limit))
        body = b""
        while (size := int(self.rfile.readline(), 16)) and (limit is None or len(body) < limit):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body if limit is None else body[:limit]

    def find_route(self, path: str) -> Callable[[], None]:
        for methods, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                return lambda: answer(self, **match.groupdict())
        raise HubError(404, f"no such route: {self.command} {path}")

    def reply(self, content: object = b"", status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if self.answer_cut is None else data[: self.answer_cut])
            self.close_connection |= self.answer_cut is not None

    # --- who asks, and for what ---------------------------------------------------------------------------

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def need_token(self) -> None:
        if self.token not in (TOKEN, READ_ONLY_TOKEN):
            raise HubError(401, "Invalid username or password.")

    def need_write(self, owner: str, branch: str = "") -> None:
        """Everyone with a token may propose to others' repositories."""
        self.need_token()
        if not (self.creates_pr or branch.startswith(PULL_REQUEST)) and (
            self.token == READ_ONLY_TOKEN or owner not in (USER, TEAM)
        ):
            raise HubError(403, "You don't have the rights to write under this namespace")

    @property
    def creates_pr(self) -> bool:
        """Whether the request's commit is to become a pull request."""
        return "create_pr" in parse_qs(urlsplit(self.path).query)

    def repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private and self.token != TOKEN
        if repository is None or hidden:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def sha(self, name: str, revision: str) -> str:
        sha = self.repository(name).resolve(revision)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # --- answers ------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self.need_token()
        self.reply({"type": "user", "name": USER, "orgs": [{"name": TEAM}]})

    def validate_card(self) -> None:
        header = json.loads(self.body)["content"].split("---")[1]
        wrong = "pipeline_tag: no-such-task" in header
        errors = [{"message": '"pipeline_tag" must be a known task'}] if wrong else []
        self.reply({"errors": errors, "warnings": []}, status=400 if wrong else 200)

    def create(self) -> None:
        wish = json.loads(self.body)
        name = f"{wish.get('organization') or USER}/{wish['name']}"
        self.need_write(name.partition("/")[0])
        if name in self.hub.repositories:
            raise HubError(409, "You already created this model repo")
        self.hub.repositories[name] = Repository(
            private=wish.get("visibility") == "private" or bool(wish.get("private"))
        )
        self.reply({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def info(self, name: str, revision: str | None = None) -> None:
        repository, sha = self.repository(name), self.sha(name, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        reply = {"id": name, "modelId": name, "sha": sha, "private": repository.private, "tags": []}
        self.reply(reply | {"siblings": siblings})

    def create_branch(self, name: str, branch: str) -> None:
        self.need_write(name.partition("/")[0])
        branches = self.repository(name).branches
        if branch in branches:
            raise HubError(409, "Reference already exists")
        branches[branch] = branches["main"]
        self.reply({})

    def plan_upload(self, name: str, branch: str) -> None:
        self.need_write(name.partition("/")[0], branch)
        present = self.repository(name).commits[self.sha(name, branch)]
        ignored = present.get(".gitignore", b"").decode().splitlines()
        files = []
        for path in [file["path"] for file in json.loads(self.body)["files"]]:
            plan = {
                "path": path,
                "uploadMode": "lfs" if is_large(path) else "regular",
                "shouldIgnore": path in ignored,
            }
            files.append(plan | ({"oid": content_hash(path, present[path])} if path in present else {}))
        self.reply({"files": files})

    def plan_blobs(self, name: str) -> None:
        self.need_token()
        objects = []
        for wish in json.loads(self.body)["objects"]:
            entry = {"oid": wish["oid"], "size": wish["size"]}
            if wish["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.endpoint}/_blobs/{wish['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/_verify"}}
            objects.append(entry)
        self.reply({"transfer": "basic", "objects": objects})

    def take_blob(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "not the content that was announced")
        self.hub.blobs[oid] = self.body
        self.reply()

    def verify_blob(self) -> None:
        wish = json.loads(self.body)
        if len(self.hub.blobs.get(wish["oid"], b"")) != wish["size"]:
            raise HubError(404, "no such blob")
        self.reply({})

    def commit(self, name: str, branch: str) -> None:
        self.need_write(name.partition("/")[0], branch)
        repository = self.repository(name)
        files, title = dict(repository.commits[self.sha(name, branch)]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"unknown operation {item['key']}")
        page, number = (
            f"{self.hub.endpoint}/{name}",
            1 + sum(ref.startswith(PULL_REQUEST) for ref in repository.branches),
        )
        sha = repository.commit(f"{PULL_REQUEST}{number}" if self.creates_pr else branch, files, title)
        reply = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}"}
        self.reply(reply | ({"pullRequestUrl": f"{page}/discussions/{number}"} if self.creates_pr else {}))

    def tree(self, name: str, revision: str) -> None:
        entries = []
        for path, data in sorted(self.repository(name).commits[self.sha(name, revision)].items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": content_hash(path, data)}
            large = {"oid": entry["oid"], "size": len(data), "pointerSize": 134}
            entries.append(entry | ({"lfs": large} if is_large(path) else {}))
        self.reply(entries)

    def file(self, name: str, revision: str, path: str) -> None:
        sha = self.sha(name, revision)
        data = self.repository(name).commits[sha].get(path)
        if data is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            return self.reply(data, **headers)
        first, last = int(part[1]), int(part[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self.reply(data[first : last + 1], status=206, **headers)


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
BRANCH, PATH = r"(?P<branch>refs/pr/\d+|[^/]+)", r"(?P<path>.+)"
ROUTES = (
    ({"GET"}, "/api/whoami-v2", Handler.whoami),
    ({"POST"}, "/api/validate-yaml", Handler.validate_card),
    ({"POST"}, "/api/repos/create", Handler.create),
    ({"GET"}, f"/api/models/{NAME}", Handler.info),
    ({"GET"}, f"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    ({"GET"}, f"/api/models/{NAME}/tree/{REVISION}", Handler.tree),
    ({"POST"}, f"/api/models/{NAME}/branch/{BRANCH}", Handler.create_branch),
    ({"POST"}, f"/api/models/{NAME}/preupload/{BRANCH}", Handler.plan_upload),
    ({"POST"}, f"/{NAME}.git/info/lfs/objects/batch", Handler.plan_blobs),
    ({"PUT"}, r"/_blobs/(?P<oid>\w+)", Handler.take_blob),
    ({"POST"}, "/_verify", Handler.verify_blob),
    ({"POST"}, f"/api/models/{NAME}/commit/{BRANCH}", Handler.commit),
    ({"GET", "HEAD"}, f"/{NAME}/resolve/{REVISION}/{PATH}", Handler.file),
)
