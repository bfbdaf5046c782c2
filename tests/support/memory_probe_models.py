"""Loads a file, runs the model and prints as JSON what memory that took.

model: a GGUF Flux, one step at a few tokens. picture: one step at the size of a picture. encoder: a
T5-XXL in GGUF. packing-TYPE: any diffusion model, packed to that type while it is loaded.
loaded-TYPE: one that ComfyUI has loaded, packed beside it.
"""
import operator
from pathlib import Path

from devtools.measure.memory_probe import run, status

INTERVAL = 0.002  # seconds between two looks at the memory


def peak_anonymous():
    """As `peak`, of RssAnon: the kernel keeps a peak only for the sum with file pages."""
    from devtools.measure.in_turn import peak

    return peak(lambda: status("RssAnon"), INTERVAL)


def probe_model(path: str) -> dict:
    import comfy.model_management
    import torch

    from featherweight.loaders.files.open_weights import open_weights
    from featherweight.loaders.models.diffusion import load_diffusion_model

    before, anonymous = status("VmRSS"), status("RssAnon")
    with peak_anonymous() as loading:
        patcher = load_diffusion_model(path)
        comfy.model_management.load_models_gpu([patcher])
    peak_after_load, loaded = status("VmHWM"), status("RssAnon")
    model = patcher.model
    context = model.diffusion_model.txt_in.in_features
    inputs = torch.randn(1, 16, 8, 8), torch.tensor([0.5])
    with peak_anonymous() as step, torch.no_grad():
        model.apply_model(*inputs, c_crossattn=torch.randn(1, 8, context), y=torch.zeros(1, 768))
    return {
        "file_bytes": Path(path).stat().st_size, "tensor_bytes": open_weights(path).tensor_bytes,
        "model_size": patcher.model_size(), "resident_before": before,
        "peak_after_load": peak_after_load, "anonymous_growth_load": loading() - anonymous,
        "anonymous_growth_step": step() - loaded,
        "largest_dense_layer": max(p.numel() * 4 for p in model.parameters())
    }


def probe_picture(path: str) -> dict:
    """512 x 512 pixels, 512 tokens of text, in bfloat16 on a CPU that has it."""
    from devtools.measure.timing import fast_dtype

    import comfy.model_management
    import torch

    from featherweight.loaders.models.diffusion import load_diffusion_model

    patcher = load_diffusion_model(path)
    patcher.set_model_compute_dtype(fast_dtype())
    comfy.model_management.load_models_gpu([patcher])
    context = patcher.model.diffusion_model.txt_in.in_features
    inputs = {
        "c_crossattn": torch.randn(1, 512, context), "y": torch.randn(1, 768),
        "guidance": torch.tensor([3.5])
    }
    with torch.no_grad():
        picture = patcher.model.apply_model(torch.randn(1, 16, 64, 64), torch.tensor([0.5]),
                                            **inputs)
    return {"file_bytes": Path(path).stat().st_size, "model_size": patcher.model_size(),
            "peak": status("VmHWM"), "finite": picture.isfinite().all().item()}


def probe_encoder(path: str) -> dict:
    import comfy.sd  # noqa: F401  imports the rest of the host before memory is counted
    import torch

    from featherweight.loaders.models.text_encoder import load_text_encoder

    before = status("VmRSS")
    clip = load_text_encoder([path], "sd3")
    peak_after_load = status("VmHWM")

    def encode(text: str) -> int:
        anonymous = status("RssAnon")
        with peak_anonymous() as largest, torch.inference_mode():
            clip.encode_from_tokens_scheduled(clip.tokenize(text))
        return largest() - anonymous

    def places() -> list[int]:
        tensors = (getattr(weight, "_qdata", weight) for weight in clip.patcher.model.parameters())
        return [tensor.data_ptr() for tensor in tensors]

    encode("feather " * 250)
    before_second = places()
    growth = encode("anvil " * 250)
    return {
        "weights_moved": sum(map(operator.ne, before_second, places())),
        "file_bytes": Path(path).stat().st_size, "model_size": clip.patcher.model_size(),
        "resident_before": before, "peak_after_load": peak_after_load,
        "peak_after_encoding": status("VmHWM"), "anonymous_growth": growth
    }


def probe_packing(path: str, type_name: str) -> dict:
    import comfy.sd  # noqa: F401  imports the rest of the host before memory is counted

    from featherweight.loaders.files.open_weights import open_weights
    from featherweight.loaders.models.diffusion import load_diffusion_model

    file = open_weights(path)
    before = status("VmRSS")
    patcher = load_diffusion_model(path, pack_to=type_name)
    return {"tensor_bytes": file.tensor_bytes, "model_size": patcher.model_size(),
            "largest_dense_tensor": max(entry.nbytes for entry in file.entries.values()),
            "peak_growth": status("VmHWM") - before}


def probe_packing_loaded(path: str, type_name: str) -> dict:
    import comfy.sd

    from featherweight.loaders.models.pack_model import pack_model

    patcher = comfy.sd.load_diffusion_model(path)
    weights = list(patcher.model.diffusion_model.parameters())
    for weight in weights:  # which the host may have mapped
        weight.data = weight.data.clone()
    before = status("VmRSS")
    with peak_anonymous() as largest:
        packed = pack_model(patcher, type_name)
    return {"tensor_bytes": sum(weight.nbytes for weight in weights),
            "model_size": packed.model_size(), "peak_growth": max(
                largest(), status("VmRSS")) - before,
            "largest_dense_tensor": max(4 * weight.numel() for weight in weights)}


if __name__ == "__main__":
    run({"model": probe_model, "picture": probe_picture, "encoder": probe_encoder,
         "packing": probe_packing, "loaded": probe_packing_loaded})
