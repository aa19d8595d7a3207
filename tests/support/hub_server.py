"""A small Hugging Face Hub on this machine: what the client `huggingface_hub` asks for, and a log.

Models are dicts of files. The server knows branches by the name main, commits, a private and a
restricted model, and answers as the Hub does: with ETag, X-Repo-Commit and X-Error-Code.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_of_the_test"


class HubServer:
    """The models of a server, and what was asked of it.

    Args:
        models: by name, the bytes of the files by their names.
        gated: names of models that need TOKEN.

    Attributes:
        asked: (method, path) of every request.
    """

    def __init__(self, models, gated=()):
        self.models, self.gated, self.asked = models, gated, []

    def commit(self, name):
        """The commit of a model: a hash of its files."""
        digest = hashlib.sha1()
        for file, content in sorted(self.models[name].items()):
            digest.update(file.encode() + content)
        return digest.hexdigest()

    def downloaded(self):
        """The names of the files whose bytes were sent."""
        paths = [path for method, path in self.asked if method == "GET" and "/resolve/" in path]
        return sorted(path.rpartition("/")[2] for path in paths)

    def answer(self, path, token):
        """Status, headers and body of the answer to a request for a path."""
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?(\?.*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        name = found[1] if found else None
        if name not in self.models:
            return 401, {"X-Error-Message": "Invalid username or password."}, b"{}"
        if name in self.gated and token != f"Bearer {TOKEN}":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"

        commit = self.commit(name)
        revision = (api[3] if api else file[2]) or "main"
        if revision not in ("main", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.models[name]
        if file and file[3] in files:
            content = files[file[3]]
            etag = hashlib.sha1(content).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, content
        if file:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if api[2] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for path, x in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()


@contextlib.contextmanager
def serving(server):
    """Serve on a free port of this machine; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append((self.command, self.path))
            status, headers, body = server.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def environment(home, endpoint, **more):
    """The environment of a process whose Hub is at an address, with an empty cache in `home`."""
    without = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    own["NO_PROXY"] = "127.0.0.1"
    return without | own | more


def files_of(folder):
    """The bytes of the files of a folder, by name."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
