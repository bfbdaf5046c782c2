"""A worker of *Run on Ray*: one ComfyUI in an actor of Ray, which draws the prompts of one editor."""
import asyncio

from .graph import GraphError, one_line
from .heard import PREVIEW_WITH_METADATA
from .host import Cancelled
from .place import MachineError
from .worker import Worker, machine

CANCEL_SECONDS = 0.2  # between two attempts to cancel a prompt


class PromptWorker(Worker):
    """Reports what happens to a prompt in values that need no class of this pack to be read.

    Args:
        comfyui: where ComfyUI is on a machine that does not name one, see `place.find`.
    """

    def __init__(self, comfyui: str = ""):
        self.unfit, self.drawing = "", set()
        try:
            super().__init__(comfyui)
        except Exception as error:  # reported by `ready`; a constructor that raises would only end the actor
            self.machine = machine()
            self.unfit = str(error) if isinstance(error, MachineError) else \
                f"its ComfyUI did not start: {one_line(f'{type(error).__name__}: {error}')}"

    async def ready(self) -> tuple[str, str]:
        """(the machine's name, what keeps it from drawing or "")."""
        return self.machine["name"], self.unfit

    async def draw(self, graph: dict, extra: dict, prompt_id: str):
        """Draws a prompt, as a stream of (event, data).

        ("begins", machine's name), ("progress", (node, value, maximum)), ("preview", JPEG or PNG), and at last one of
        ("images", array (N, H, W, C)), ("failed", sentence), ("unfit", what this machine lacks), or nothing where the prompt
        was cancelled.
        """
        self.drawing.add(prompt_id)
        try:
            async for event, data in self.stream(graph, extra, prompt_id):
                if event == "execution_start":
                    yield "begins", self.machine["name"]
                elif event == "progress":
                    yield "progress", (data["node"], data["value"], data["max"])
                elif event == PREVIEW_WITH_METADATA:
                    yield "preview", data[4 + int.from_bytes(data[:4], "big"):]
                elif event == "answer":
                    yield "images", data[1].cpu().float().contiguous().numpy()
        except GraphError as error:
            yield "failed", str(error)
        except MachineError as error:
            yield "unfit", f"{self.machine['name']}: {error}"
        except Cancelled:
            pass
        finally:
            self.drawing.discard(prompt_id)

    async def cancel(self, prompt_id: str):
        """Ends a prompt, whether it waits or runs; returns when it has ended."""
        while prompt_id in self.drawing:  # it may not have reached the host's queue yet
            self.host.cancel(prompt_id)
            await asyncio.sleep(CANCEL_SECONDS)
