"""What ComfyUI alone, without this pack, makes of files:
`host_alone.py INPUTS OUT CLIP CHECKPOINT FILES`.

Runs in a process of its own. INPUTS, OUT: of `torch.save`; INPUTS are the arguments of
`apply_model`. CLIP: of a text encoder for Flux.2. CHECKPOINT: a whole one of SD1.5's kind, or
`none`. FILES: of diffusion models in one folder with it.
OUT has, by the names of the files, the formats of their layers, and what a model gives when *Load
Diffusion Model*, *Load Checkpoint* and, once ComfyUI has saved it, *Load Diffusion Model* have
loaded it; what the checkpoint draws; and the modules of this pack.
"""
import os
import sys
from pathlib import Path

import torch

HOST = Path(os.environ.get("COMFYUI_PATH", Path(__file__).parents[2] / ".dev/host"))


def run(model, inputs: dict):
    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode():
        return model.model.apply_model(**inputs)


def formats(model) -> set[str]:
    return {getattr(module, "quant_format", None) or "" for module in model.modules()}


def opened(file: Path, inputs: dict) -> dict:
    model, = nodes.UNETLoader().load_unet(file.name, "default")
    again = file.with_name(f"again {file.name}")
    comfy.sd.save_checkpoint(str(again), model)
    folder_paths.filename_list_cache.clear()
    return {"formats": formats(model.model), "model": run(model, inputs),
            "again": run(nodes.UNETLoader().load_unet(again.name, "default")[0], inputs),
            "checkpoint": run(nodes.CheckpointLoaderSimple().load_checkpoint(file.name)[0], inputs)}


def drawn(model, clip, vae) -> torch.Tensor:
    """A picture of two steps with some text."""
    import nodes

    conditioning = nodes.CLIPTextEncode().encode(clip, "a feather on a scale")[0]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    samples, = nodes.KSampler().sample(model, 1, 2, 2.0, "euler", "normal", conditioning,
                                       conditioning, latent)
    return nodes.VAEDecode().decode(vae, samples)[0]


if __name__ == "__main__":
    inputs_file, out_file, clip_file, checkpoint_file, *files = map(Path, sys.argv[1:])
    own = Path(__file__).parent
    sys.path[:] = [str(HOST), *(folder for folder in sys.path if Path(folder) != own)]
    sys.argv = ["main.py", "--cpu", "--fp32-unet"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sd
    import folder_paths

    import nodes

    torch.set_num_threads(1)
    for folder in ("diffusion_models", "checkpoints", "text_encoders"):
        folder_paths.add_model_folder_path(folder, str(clip_file.parent))
    arguments = torch.load(inputs_file)
    outputs = {file.name: opened(file, arguments) for file in files}
    clip, = nodes.CLIPLoader().load_clip(clip_file.name, "flux2")
    outputs[clip_file.name] = {"formats": formats(clip.patcher.model)}
    if checkpoint_file.is_file():
        parts = nodes.CheckpointLoaderSimple().load_checkpoint(checkpoint_file.name)
        outputs[checkpoint_file.name] = {"formats": formats(parts[0].model), "drawn": drawn(*parts)}
    outputs["pack"] = [name for name in sys.modules if name.split(".")[0] == "featherweight"]
    torch.save(outputs, out_file)
