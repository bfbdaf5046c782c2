"""One prompt as its ComfyUI tells a browser about it: progress, previews, and that it has ended."""
import json
import struct
import threading
from collections.abc import Callable

PREVIEW_WITH_METADATA = 4  # the host's `protocol.BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA`


class Listener:
    """In the place of a browser's websocket: `PromptServer` awaits `send_json` and `send_bytes` of it, in its own loop.

    heard(event, data) gets what concerns this prompt and nothing else, as `PromptServer.send_sync` takes it to tell it on: a
    name and a dict, or a number and bytes. It is called in the host's loop, so it must return at once.
    """

    def __init__(self, prompt_id: str, heard: Callable | None, started: Callable):
        self.prompt_id, self.heard, self.started = prompt_id, heard, started
        self.ended, self.cancelled, self.running = threading.Event(), False, False

    async def send_json(self, message: dict):
        event, data = message["type"], message["data"]
        if data.get("prompt_id") != self.prompt_id:
            return
        if event == "execution_start":
            self.running = True
            self.started(self)
        if self.heard:
            self.heard(event, data)
        if event == "executing" and data.get("node") is None:  # after the history has it
            self.running = False
            self.ended.set()

    async def send_bytes(self, message: bytes):
        if self.heard and self.running:
            event, data = struct.unpack(">I", message[:4])[0], bytes(message[4:])
            if event != PREVIEW_WITH_METADATA or self._is_mine(data):
                self.heard(event, data)

    def _is_mine(self, data: bytes) -> bool:
        length = struct.unpack(">I", data[:4])[0]
        return json.loads(data[4:4 + length]).get("prompt_id", self.prompt_id) == self.prompt_id
