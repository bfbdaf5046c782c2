"""What ComfyUI tells about a prompt while it runs: progress, previews, completion."""
import json
import struct
import threading
from collections.abc import Callable

PREVIEW_WITH_METADATA = 4  # ComfyUI's `protocol.BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA`

OnEvent = Callable[[str | int, dict | bytes], object]


class PromptListener:
    """Receives one prompt's websocket events: progress, previews, completion.

    It takes the place of a browser's websocket, whose methods `PromptServer` awaits.

    Args:
        prompt_id: events of other prompts are ignored.
        on_event: is called with (event, data): a name and a dict, or a number and bytes. It runs in
            ComfyUI's event loop, so it must return at once.
        on_start: is called with this listener when ComfyUI begins the prompt.
    """

    def __init__(self, prompt_id: str, on_event: OnEvent | None,
                 on_start: Callable[["PromptListener"], None]):
        self.prompt_id = prompt_id
        self.on_event = on_event
        self.on_start = on_start
        self.ended = threading.Event()
        self.cancelled = False
        self.running = False

    async def send_json(self, message: dict):
        event, data = message["type"], message["data"]
        if data.get("prompt_id") != self.prompt_id:
            return
        if event == "execution_start":
            self.running = True
            self.on_start(self)
        if self.on_event:
            self.on_event(event, data)
        # sent after the prompt was added to the history
        if event == "executing" and data.get("node") is None:
            self.running = False
            self.ended.set()

    async def send_bytes(self, message: bytes):
        if self.on_event and self.running:
            event, data = struct.unpack(">I", message[:4])[0], bytes(message[4:])
            if event != PREVIEW_WITH_METADATA or self._is_own(data):
                self.on_event(event, data)

    def _is_own(self, data: bytes) -> bool:
        length = struct.unpack(">I", data[:4])[0]
        return json.loads(data[4:4 + length]).get("prompt_id", self.prompt_id) == self.prompt_id
