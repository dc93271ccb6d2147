"""A stand-in for the Hugging Face Hub on 127.0.0.1: as much of its API as push and pull use.

Files live in memory: `hub.repos[name]` is {branch: {path: bytes}}. Tests change them directly to
play a hostile or damaged repository; `hub.log` has every request's method and path.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    def __init__(self):
        self.repos, self.log, self.token, self.asked = {}, [], None, {}
        self.commits, self.broken = {}, None

    def files(self, repo, branch="main"):
        return self.repos[repo][branch]

    def tree(self, repo, revision):
        """The files of a branch or of a commit; None where there is no such revision."""
        return self.repos[repo].get(revision) or self.commits.get(revision)

    def commit_of(self, files):
        listing = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        sha = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value, status=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code):
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def handle_any(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.log.append((self.command, path))
        if hub.broken is not None:
            return self.answer({"error": "out of order"}, hub.broken)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self.about(found[1], found[2] or "/revision/main", body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*found.groups())
        return self.refuse(404, "EntryNotFound")

    do_GET = do_POST = do_HEAD = handle_any  # noqa: N815

    def create(self, asked):
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if repo in self.server.hub.repos else 200
        self.server.hub.repos.setdefault(repo, {"main": {".gitattributes": b"*.bin\n"}})
        self.server.hub.asked[repo] = asked
        self.answer({"url": f"{self.server.address}/{repo}", "id": repo, "name": repo}, status)

    def about(self, repo, rest, body):
        hub = self.server.hub
        if repo not in hub.repos:
            return self.refuse(404, "RepoNotFound")
        action, _, revision = rest.strip("/").partition("/")
        if action == "branch":
            start = hub.files(repo)
            status = 409 if revision in hub.repos[repo] else 200
            hub.repos[repo].setdefault(revision, dict(start))
            return self.answer({}, status)
        revision = revision.partition("/")[0] if action == "tree" else revision
        files = hub.tree(repo, revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        sha = hub.commit_of(files)
        if action == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": repo, "modelId": repo, "sha": sha, "siblings": siblings})
        if action == "tree":
            return self.answer([
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                for name, data in files.items()
            ])  # fmt: skip
        if action == "preupload":
            return self.answer({"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]})  # fmt: skip
        if action == "commit":
            return self.commit(repo, files, sha, [json.loads(x) for x in body.splitlines()])
        return self.refuse(404, "EntryNotFound")

    def commit(self, repo, files, sha, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", sha) != sha:
                return self.answer({"error": "the branch has moved"}, 412)
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.server.hub.commit_of(files)
        url = f"{self.server.address}/{repo}/commit/{oid}"
        return self.answer({"success": True, "commitOid": oid, "commitUrl": url})

    def resolve(self, repo, revision, name):
        files = self.server.hub.tree(repo, revision) if repo in self.server.hub.repos else None
        if files is None or name not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[name]
        commit = self.server.hub.commit_of(files)
        return self.answer(data, ETag=f'"{etag(data)}"', X_Repo_Commit=commit)


def etag(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving():
    """Yields the hub and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub, server.address = Hub(), f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.hub, server.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
