"""A real ComfyUI server for tests: it lives in a folder of its own and is driven over HTTP and its websocket.

Nothing of the developer's ComfyUI is read or written but its program files: models, custom nodes, inputs, outputs,
settings and database are in the given folder.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

PACK = "lance"  # the folder's name in custom_nodes, and so the pack's name in the editor
SETTINGS = {"Comfy.TutorialCompleted": True}
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")

Prompt = dict[str, dict[str, Any]]
Event = dict[str, Any]


class InvalidPrompt(Exception):
    """The server refused a prompt. `errors` maps node ids to lists of sentences; `reply` is the whole answer."""

    def __init__(self, reply: dict[str, Any]):
        self.reply = reply
        self.errors = {
            node: [f"{error['message']}: {error['details']}" for error in report["errors"]]
            for node, report in (reply.get("node_errors") or {}).items()
        }
        super().__init__(json.dumps(self.errors or reply["error"], indent=1))


class ExecutionFailed(Exception):
    """A node raised, or the prompt was interrupted. `event` is the websocket's last message about the prompt."""

    def __init__(self, kind: str, event: Event):
        self.kind, self.event = kind, event
        self.node_type: str = event.get("node_type", "")
        self.message: str = event.get("exception_message", "").strip()
        super().__init__(f"{kind} in {self.node_type}: {self.message}")


@dataclass(frozen=True)
class Run:
    """A prompt that has run: the server's history entry, and its websocket events (type and data) in order."""

    history: dict[str, Any]
    events: list[tuple[str, Event]]
    previews: list[bytes]  # JPEG or PNG files, in order
    texts: list[tuple[str, str]]  # (node id, text) of what was shown on nodes while they worked

    def outputs(self, node: str) -> dict[str, Any]:
        """What the node showed: `{"images": […]}`, `{"text": […]}`…; empty when it showed nothing."""
        return self.history["outputs"].get(node, {})


class ComfyServer:
    """Starts on entering the context, on a free port, and stops on leaving it."""

    def __init__(self, comfyui: Path, python: Path, folder: Path, arguments: tuple[str, ...] = ()):
        self.comfyui, self.python, self.folder, self.arguments = comfyui, python, folder, arguments
        self.log = folder / "server.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ComfyServer:
        for name in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS))
        command = [
            str(self.python), str(self.comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(self.folder), "--database-url", f"sqlite:///{self.folder / 'comfyui.db'}",
            "--disable-auto-launch", *self.arguments,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=self.comfyui, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready(seconds=180)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait_until_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.25)
        raise RuntimeError(f"ComfyUI did not start; its log ends with:\n{self.log.read_text(errors='replace')[-4000:]}")

    def request(self, path: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """GET, or POST when there is data. Raises `urllib.error.HTTPError` for an error status."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers or {}), timeout=60) as reply:
            return reply.read()

    def get(self, path: str) -> Any:
        return json.loads(self.request(path))

    def post(self, path: str, value: object) -> Any:
        reply = self.request(path, json.dumps(value).encode(), {"Content-Type": "application/json"})
        return json.loads(reply) if reply else None

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def run(
        self,
        prompt: Prompt,
        *,
        workflow: dict[str, Any] | None = None,
        preview_method: str | None = None,
        on_event: Callable[[str, Event], None] = lambda kind, data: None,
        seconds: float = 300,
    ) -> Run:
        """Run an API-format graph to its end.

        `workflow` is the editor's graph, which savers write into their files; `preview_method` what the editor's
        setting for previews says. `on_event` sees every event as it arrives, and may call `interrupt`. Raises
        `InvalidPrompt` when the server refuses the graph, `ExecutionFailed` when a node raises or the run is
        interrupted, and `TimeoutError`.
        """
        client = uuid.uuid4().hex
        with connect(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", max_size=None, proxy=None) as socket_:
            request = {"prompt": prompt, "client_id": client}
            extra = {"extra_pnginfo": workflow and {"workflow": workflow}, "preview_method": preview_method}
            request["extra_data"] = {name: value for name, value in extra.items() if value}
            try:
                prompt_id = self.post("/prompt", request)["prompt_id"]
            except urllib.error.HTTPError as refusal:
                raise InvalidPrompt(json.loads(refusal.read())) from None
            events, frames, deadline = [], [], time.monotonic() + seconds
            while True:
                message = socket_.recv(timeout=max(deadline - time.monotonic(), 0))
                if isinstance(message, bytes):
                    frames.append(message)
                    continue
                kind, data = (event := json.loads(message))["type"], event.get("data", {})
                events.append((kind, data))
                on_event(kind, data)
                if kind in ENDINGS and data["prompt_id"] == prompt_id:
                    break
        if kind != "execution_success":
            raise ExecutionFailed(kind, data)
        return Run(self._history(prompt_id), events, previews_in(frames), texts_in(frames))

    def _history(self, prompt_id: str) -> dict[str, Any]:
        # The entry is written a moment after the success event is sent.
        for _ in range(100):
            if prompt_id in (entries := self.get(f"/history/{prompt_id}")):
                return entries[prompt_id]
            time.sleep(0.05)
        raise TimeoutError(f"The server has no history of prompt {prompt_id}.")

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def output_files(self, run: Run) -> list[Path]:
        """The files of all nodes of a run, in the order of the nodes in the history."""
        return [self._path(entry) for outputs in run.history["outputs"].values() for entry in _file_entries(outputs)]

    def _path(self, entry: dict[str, str]) -> Path:
        return self.folder / entry["type"] / entry["subfolder"] / entry["filename"]

    def view(self, entry: dict[str, str]) -> bytes:
        return self.request("/view?" + urllib.parse.urlencode(entry))

    def upload_image(self, path: Path, name: str | None = None) -> str:
        """Put a picture or a clip into the input folder as the editor does, and return the name to load it by."""
        rule = f"--{uuid.uuid4().hex}"
        field = "Content-Disposition: form-data; name="
        head = f'{rule}\r\n{field}"image"; filename="{name or path.name}"\r\n\r\n'
        tail = f'\r\n{rule}\r\n{field}"overwrite"\r\n\r\ntrue\r\n{rule}--\r\n'
        body = head.encode() + path.read_bytes() + tail.encode()
        content_type = {"Content-Type": f"multipart/form-data; boundary={rule[2:]}"}
        return json.loads(self.request("/upload/image", body, content_type))["name"]


def previews_in(frames: list[bytes]) -> list[bytes]:
    """Pictures of binary websocket frames: a number for the kind (1), one for the format, the file (protocol.py)."""
    return [frame[8:] for frame in frames if frame[:4] == b"\0\0\0\1"]


def texts_in(frames: list[bytes]) -> list[tuple[str, str]]:
    """Node ids and texts of binary websocket frames: kind 3, the id's length, the id, the text."""
    texts = [frame[4:] for frame in frames if frame[:4] == b"\0\0\0\3"]
    ends = [4 + int.from_bytes(text[:4], "big") for text in texts]
    return [(text[4:end].decode(), text[end:].decode()) for text, end in zip(texts, ends)]


def _file_entries(outputs: dict[str, Any]) -> Iterator[dict[str, str]]:
    for entries in outputs.values():
        yield from (entry for entry in entries if isinstance(entry, dict) and "filename" in entry)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find_comfyui() -> Path | None:
    """The checkout at COMFYUI_PATH, or ~/comfy/ComfyUI; None when there is none."""
    path = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
    return path.resolve() if (path / "main.py").is_file() else None


def find_python(comfyui: Path) -> Path:
    """COMFYUI_PYTHON, or the virtual environment beside the checkout, or this interpreter."""
    if "COMFYUI_PYTHON" in os.environ:
        return Path(os.environ["COMFYUI_PYTHON"])
    windows = os.name == "nt"
    beside = comfyui.parent / "venv" / ("Scripts/python.exe" if windows else "bin/python")
    return beside if beside.is_file() else Path(sys.executable)


def run_inside(comfyui: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A script that has run in ComfyUI's interpreter, where it can import ComfyUI, and the pack as `lance`."""
    here = str(Path(__file__).parent)
    begin = f"import sys; sys.path.append({here!r}); import inside; inside.begin({str(comfyui)!r})\n"
    command = [str(find_python(comfyui)), "-c", begin + script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
