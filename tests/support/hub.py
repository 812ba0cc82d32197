"""A stand-in for the model hub on this machine: its commit, LFS and download requests, with files in memory.

It shows what is sent, and that a client reads it back. It is not a proof of anything about the real hub.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a_token"
COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        """Content by repository and name."""
        self.blobs: dict[str, bytes] = {}
        """Content of large files by sha256."""
        self.private: dict[str, bool] = {}

    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def reply(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        path, data = self.path.partition("?")[0], self.body()
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.files.setdefault(name, {})
            self.server.private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            return self.reply(200, {"url": f"{self.server.endpoint}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            uploads = [
                {**o, "actions": {"upload": {"href": f"{self.server.endpoint}/blob/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": uploads})
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(data)["files"]
            ]
            return self.reply(200, {"files": modes})
        if "/commit/" in path:
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[repository][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[repository][value["path"]] = self.server.blobs[value["oid"]]
            url = f"{self.server.endpoint}/{repository}/commit/{COMMIT}"
            return self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        return self.reply(404, {"error": "not found"})

    def do_PUT(self) -> None:
        data = self.body()
        oid = hashlib.sha256(data).hexdigest()
        if self.path != f"/blob/{oid}":
            return self.reply(400, {"error": "sha256"})
        self.server.blobs[oid] = data
        return self.reply(200, {})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.server.files:
            repository = "/".join(parts[2:4])
            if len(parts) == 4 or parts[4] == "revision":
                siblings = [{"rfilename": name} for name in self.server.files[repository]]
                return self.reply(200, {"id": repository, "sha": COMMIT, "tags": [], "siblings": siblings})
        content = self.server.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if parts[2:3] != ["resolve"] or content is None:
            return self.reply(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
        digest = hashlib.sha256(content).hexdigest()
        return self.reply(200, content, ETag=f'"{digest}"', X_Repo_Commit=COMMIT, Accept_Ranges="none")

    do_HEAD = do_GET
