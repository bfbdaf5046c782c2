"""Text encoders through the real server: files that cannot be used are said in plain words, and the
server goes on."""
import contextlib

import numpy as np
import pytest

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf, write_random_gguf
from devtools.host.server import ServerError

ONE = np.ones((4, 32), np.float32)
LOADERS = {"FeatherweightLoadTextEncoder": "text_encoder_1", "CLIPLoaderGGUF": "clip_name"}


@pytest.fixture(scope="module")
def encoders(server):
    return server.base / "models" / "text_encoders"


def encode(server, loader, **inputs):
    """Queue a loader and a prompt behind it."""
    return server.queue({
        "1": {"class_type": loader, "inputs": inputs},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 0], "text": "a feather"}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    })


def write_flux(path):
    write_gguf(path, tiny_models.flux(hidden=128, double_blocks=1, single_blocks=1),
               lambda name, values: "Q8_0")


# name -> (writes the file, what the message must say beside the file's name)
REFUSED = {
    "mmproj alone": (lambda path: write_gguf(
        path, {"v.blk.0.attn_q.weight": ONE, "mm.0.weight": ONE}, lambda *_: "F32"),
                     "is the vision part"), "diffusion model": (write_flux, "is a diffusion model"),
    "LoRA": (
        lambda path: write_gguf(path, {"lora_te1_mlp_fc1.lora_up.weight": ONE}, lambda *_: "F32"),
        "is a LoRA"),
    "damaged": (lambda path: path.write_bytes(b"GGUF" + bytes(5)), "version 0")
}


@pytest.mark.parametrize(("loader", "case"), [*zip([*LOADERS] * 2, REFUSED)])
def test_a_file_that_is_no_text_encoder_is_one_plain_error(server, encoders, loader, case):
    write, message = REFUSED[case]
    path = encoders / f"{case}.gguf"
    write(path)
    with pytest.raises(ServerError, match=message) as error:
        encode(server, loader, **{LOADERS[loader]: path.name, "type": "stable_diffusion"})
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_a_packed_language_model_writes_text_through_the_hosts_node(server, encoders):
    width, tokens = 1024, 151936  # Qwen3 0.6B, the smallest that writes
    shapes = {"token_embd.weight": (tokens, width), "output_norm.weight": (width,)}
    for layer in range(28):
        parts = {
            "attn_q": (2048, width), "attn_k": (1024, width), "attn_v": (1024, width),
            "attn_output": (width, 2048)
        }
        parts |= {"ffn_gate": (3072, width), "ffn_up": (3072, width), "ffn_down": (width, 3072)}
        parts |= {
            "attn_norm": (width,), "ffn_norm": (width,), "attn_q_norm": (128,),
            "attn_k_norm": (128,)
        }
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    path = encoders / "qwen3.gguf"
    write_random_gguf(path, shapes, "Q4_K", architecture="qwen3")
    run = server.queue({
        "1": {
            "class_type": "CLIPLoaderGGUF",
            "inputs": {"clip_name": path.name, "type": "stable_diffusion"}
        }, "2": {
            "class_type": "TextGenerate", "inputs": {
                "clip": ["1", 0], "prompt": "a feather", "max_length": 3, "sampling_mode": "off"
            }
        }, "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}
    })
    with contextlib.suppress(PermissionError):  # Windows removes none that the server maps
        path.unlink()
    assert "".join(run.outputs["3"]["text"])
    assert f"{path.name}: Qwen3 0.6B" in server.log()
