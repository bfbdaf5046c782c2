"""A call on a file fails in the real server: one sentence, and the next prompt draws what it would
have drawn."""
import os

from devtools.cluster import workflow

import faults
import pytest
from safetensors.torch import save_file

from devtools.files import demo_files
from devtools.host.server import Server, ServerError

pytestmark = pytest.mark.not_on_fake_gpus(reason="the CPU's memory and files are what is at stake")
FAILING = "of a bad drive"  # in the paths of the files whose calls are counted and fail
MODEL, DENSE, LORA = (
    f"{FAILING}.gguf",
    f"dense {FAILING}.safetensors",
    f"lora {FAILING}.safetensors",
)
PLANTED = """
import ctypes, os
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS, faults = {}, ctypes.CDLL(os.environ["LD_PRELOAD"])

@PromptServer.instance.routes.post("/faults")
async def arm(request):
    given = await request.json()
    counted = faults.counted()
    faults.arm(os.fsencode(given["part"]), ctypes.c_long(given["nth"]), given["error"])
    return web.json_response(counted)
"""


class FaultyServer(Server):
    """A server in which calls on files can be made to fail."""

    def arm(self, part: str = "", nth: int = 0, error: int = 0) -> int:
        """From now on the nth call on a file with `part` in its path fails. How many there were
        since the last arming."""
        return int(self.post("/faults", {"part": part, "nth": nth, "error": error}))

    def drawn(self, graph: dict) -> bytes:
        """The values of its picture; models and LoRAs are loaded anew, as their files seem to have
        been replaced."""
        for path in (self.base / "models").rglob(f"*{FAILING}*"):
            os.utime(path)
        return self.pixels(self.queue(graph)).tobytes()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    base = tmp_path_factory.mktemp("faulty")
    library = faults.compiled(base)
    demo_files.make_models(base, types=())
    models = base / "models"
    demo_files.write_model(models / "diffusion_models" / MODEL, "Q8_0")
    save_file({name: tensor.bfloat16() for name, tensor in demo_files.flux().items()},
              models / "diffusion_models" / DENSE)
    next((models / "loras").iterdir()).rename(models / "loras" / LORA)
    env = {
        "LD_PRELOAD": str(library), "FEATHERWEIGHT_PACKED_CACHE": str(base / f"packed {FAILING}"),
        "OMP_NUM_THREADS": "1"
    }
    with FaultyServer(base, extra_custom_nodes={"faults": PLANTED},
                      arguments=["--disable-metadata"], env=env) as server:
        yield server


def graph(**loader) -> dict:
    found = workflow(loras=())
    found["1"]["inputs"] |= loader
    found["6"] = {
        "class_type": "FeatherweightApplyLora", "inputs": {
            "model": ["1", 0], "lora_name": LORA, "strength_model": 1.0, "strength_clip": 1.0,
            "block_weights": "", "misfits": "skip"
        }
    }
    found["7"]["inputs"]["model"] = ["6", 0]
    found["9"] = {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}
    return found


SAVED = {
    "class_type": "FeatherweightSavePackedModel", "inputs": {
        "model": ["6", 0], "type": "Q8_0", "size_gb": 1.0,
        "filename_prefix": f"diffusion_models/saved {FAILING}", "folder": "output",
        "loras": "keep LoRA quality (larger)", "overwrite": True
    }
}
WORK = {
    "loading": graph(model_name=MODEL),
    "packing while loading": graph(model_name=DENSE, pack_to="Q8_0"),
    "saving": graph(model_name=MODEL) | {"10": SAVED}
}
POINTS = 16  # at which a fault comes, spread over the calls of a prompt


@pytest.mark.heavy
@pytest.mark.parametrize("error", faults.ERRORS)
@pytest.mark.parametrize("work", WORK)
def test_a_fault_is_one_sentence_and_the_next_prompt_is_right(work, error, faulty):
    def files():
        return {
            path.name: path.read_bytes() for path in (faulty.base / "output").rglob("*")
            if path.is_file()
        }

    asked = WORK[work]
    expected, saved = faulty.drawn(asked), files()
    faulty.arm(FAILING)
    assert faulty.drawn(asked) == expected
    calls = faulty.arm()
    assert calls > 5
    refused = 0
    for nth in sorted({1 + calls * part // POINTS for part in range(POINTS)}):
        faulty.arm(FAILING, nth, faults.ERRORS[error])
        try:
            assert faulty.drawn(asked) == expected, f"call {nth} of {calls}"
        except ServerError as refusal:
            refused += 1
            said = str(refusal)
            assert FAILING in said and "\n" not in said and said.endswith((".", ")")), (
                f"call {nth} of {calls}: {said}"
            )
        faulty.arm()
        assert files() == saved, f"call {nth} of {calls}"
        assert faulty.drawn(asked) == expected, f"after call {nth} of {calls}"
    assert refused
