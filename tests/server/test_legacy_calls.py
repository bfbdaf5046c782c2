"""Legacy ids called as Python in the real host, by a script that somebody exported and by the nodes
of another pack, and asked about by scripts that talk to its server."""
import os
import subprocess
import sys

from devtools.cluster import workflow

import numpy as np
from legacy_ids import INPUTS, KJ
from PIL import Image

from devtools import demo
from devtools.files import demo_files
from devtools.host.server import HOST

# What an exporter writes: the host's start without its server, then each node in turn.
EXPORTED = f'''
import asyncio, sys
sys.argv = ["main.py", "--base-directory", *sys.argv[1:], "--disable-api-nodes"]
import comfy.options
comfy.options.enable_args_parsing()
# for the user's folders of models; older hosts find it only before `nodes` is imported
import utils.extra_config
import torch


def get_value_at_index(obj, index):
    try:
        return obj[index]
    except KeyError:
        return obj["result"][index]


def import_custom_nodes():
    import execution, server
    from nodes import init_extra_nodes
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    execution.PromptQueue(server.PromptServer(loop))
    loop.run_until_complete(init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))


def main():
    import_custom_nodes()
    from nodes import NODE_CLASS_MAPPINGS, CLIPTextEncode, KSampler, SaveImage, VAEDecode, VAELoader
    with torch.inference_mode():
        unetloadergguf = NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()
        unetloadergguf_1 = unetloadergguf.load_unet(unet_name="{demo.MODEL_NAME}")
        cliploadergguf = NODE_CLASS_MAPPINGS["CLIPLoaderGGUF"]()
        cliploadergguf_2 = cliploadergguf.load_clip(
            clip_name="{demo_files.ENCODER_NAME}", type="stable_diffusion")
        vaeloader_3 = VAELoader().load_vae(vae_name="{demo_files.VAE_NAME}")
        cliptextencode_4 = CLIPTextEncode().encode(
            text="a blue house", clip=get_value_at_index(cliploadergguf_2, 0))
        emptysd3latentimage = NODE_CLASS_MAPPINGS["EmptySD3LatentImage"]()
        emptysd3latentimage_5 = emptysd3latentimage.EXECUTE_NORMALIZED(
            width=128, height=128, batch_size=1)
        ksampler_6 = KSampler().sample(
            seed=1, steps=2, cfg=1, sampler_name="euler", scheduler="simple", denoise=1,
            model=get_value_at_index(unetloadergguf_1, 0),
            positive=get_value_at_index(cliptextencode_4, 0),
            negative=get_value_at_index(cliptextencode_4, 0),
            latent_image=get_value_at_index(emptysd3latentimage_5, 0))
        vaedecode_7 = VAEDecode().decode(
            samples=get_value_at_index(ksampler_6, 0), vae=get_value_at_index(vaeloader_3, 0))
        SaveImage().save_images(
            filename_prefix="exported", images=get_value_at_index(vaedecode_7, 0))


main()
'''

def graph(unet: str, clip: str) -> dict:
    return workflow("a blue house", loras=()) | {
        "1": {"class_type": unet, "inputs": {"unet_name": demo.MODEL_NAME}}, "2": {
            "class_type": clip,
            "inputs": {"clip_name": demo_files.ENCODER_NAME, "type": "stable_diffusion"}
        }
    }


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def queued(server, *loaders) -> tuple:
    run = server.queue(graph(*loaders))
    return picture(server.base / "output" / run.outputs["9"]["images"][0]["filename"]), run.texts


def test_wrappers_and_an_exported_workflow_draw_what_the_loaders_draw(server):
    server.forget()
    for path in (server.base / "output").glob("exported*.png"):
        path.unlink()
    expected, texts = queued(server, "UnetLoaderGGUF", "CLIPLoaderGGUF")
    assert expected.std() > 5
    wrapped, texts_of_wrappers = queued(server, "WrappedUnet", "WrappedClip")
    assert np.array_equal(wrapped, expected)
    assert "in memory" in texts["1"][-1]
    assert texts == texts_of_wrappers  # shown on the node that runs
    env = {**os.environ, **server.env}
    subprocess.run(
        [sys.executable, "-c", EXPORTED,
         str(server.base), *server.arguments], cwd=HOST, check=True, timeout=300,
        env={**env, "PYTHONPATH": os.pathsep.join([str(HOST), env.get("PYTHONPATH", "")])})
    path, = (server.base / "output").glob("exported*.png")
    assert np.array_equal(picture(path), expected)


def test_scripts_find_the_options_of_an_input_in_place_of_its_type_as_in_the_original_packs(server):
    """KJNodes' loader is of the newer kind there too, and has them elsewhere."""
    object_info = server.object_info()
    loader = object_info["UnetLoaderGGUF"]["input"]["required"]["unet_name"]
    assert demo.MODEL_NAME in loader[0]
    assert object_info["CLIPLoaderGGUF"]["input"]["required"]["type"][0][0] == "stable_diffusion"
    dtype = object_info["UnetLoaderGGUFAdvanced"]["input"]["optional"]["dequant_dtype"]
    assert dtype[0][0] == dtype[1]["default"] == "default"
    for node_id in INPUTS.keys() - KJ:
        sections = object_info[node_id]["input"]
        inputs = sections["required"] | sections.get("optional", {})
        for name, (kind, *settings) in inputs.items():
            assert kind != "COMBO" and "options" not in settings[0], (node_id, name)
