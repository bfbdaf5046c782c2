"""A node that takes any number of LoRAs as inputs of its own naming, and applies each as the host's
node does."""
import comfy.sd
import comfy.utils
import folder_paths

from nodes import LoraLoader


class Flexible(dict):
    def __contains__(self, name):
        return True

    def __getitem__(self, name):
        return super().get(name, ("*",))


class ManyLoras:
    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "other"

    @classmethod
    def INPUT_TYPES(s):
        return {
            "required": {"directly": ("BOOLEAN",)},
            "optional": Flexible(model=("MODEL",), clip=("CLIP",)), "hidden": {}
        }

    def load(self, directly, model=None, clip=None, **loras):
        for name, entry in loras.items():
            if not (name.startswith("lora_") and entry["on"]):
                continue
            if directly:
                lora = comfy.utils.load_torch_file(
                    folder_paths.get_full_path("loras", entry["lora"]), safe_load=True)
                model, clip = comfy.sd.load_lora_for_models(
                    model, clip, lora, entry["strength"], entry["strength"]
                )
            else:
                model, clip = LoraLoader().load_lora(model, clip, entry["lora"], entry["strength"],
                                                     entry["strength"])
        return model, clip


NODE_CLASS_MAPPINGS = {"ManyLoras": ManyLoras}
