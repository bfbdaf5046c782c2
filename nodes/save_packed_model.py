"""The node Save Packed Model (Featherweight)."""
import json
import os
import re

from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..loaders.files.safetensors_writer import INT4_PRODUCT
from ..loaders.packing.calibration.imatrix import load_measurement
from ..loaders.packing.checkpoint_source import source_of_checkpoint
from ..loaders.packing.layer_losses import measuring_advice
from ..loaders.packing.planning.file_plan import (
    HOST_TYPES,
    KEEP_TYPES,
    MIXES,
    RENAMED_TYPES,
    SAVE_TYPES,
    SaveOptions,
    best_mix,
    plan_file,
    reject_own_files,
    suffix_for,
)
from ..loaders.packing.planning.plan import relative_error
from ..loaders.packing.save import save
from ..loaders.packing.source import (
    check_saveable,
    source_of_encoders,
    source_of_model,
    unsaved_parts,
)
from ..loaders.paths.folders import (
    MODELS,
    OUTPUT,
    find_sensitivity,
    list_measurements,
    new_model_path,
    validate_measurement,
)
from ..loaders.paths.name_tokens import fill_in
from ..loaders.progress import Progress
from ..loaders.recipe import source_name
from ..ops.packing.pack_types import ROW_TYPES
from .added_inputs import REPLACED
from .load_diffusion_model import DEFAULT_SIZE, MIX, size_in_bytes, size_input
from .node_text import show_text
from .renamed_options import current, renamed_combo
from .search_words import SAVING_WORDS

HOST_MIX = f"{MIX}: ComfyUI's types"
# option -> types of ComfyUI's own with which the size is met; None: the best two
SIZES = {MIX: (), HOST_MIX: None, **{f"{MIX}: {' + '.join(mix)}": mix for mix in MIXES}}
KEEP_QUALITY, KEEP_SIZE = "keep LoRA quality (larger)", "keep the size"
NONE = "none"  # no measurement
W4A4 = "convrot_w4a4"
OFFERED = [*SAVE_TYPES, KEEP_TYPES, MIX, *HOST_TYPES, *[INT4_PRODUCT] * (W4A4 in HOST_TYPES),
           HOST_MIX]
# with those that workflows may name: two types by name, and what this ComfyUI does not read, which
# `plan_file` says
RENAMED_SAVE_TYPES = RENAMED_TYPES | {
    option.replace(MIX, "size in GB", 1): option for option in SIZES if option != HOST_MIX
} | {option: option for option in (*ROW_TYPES, INT4_PRODUCT, *SIZES) if option not in OFFERED}
RENAMED_LORAS = {"arrive whole": KEEP_QUALITY, "in the type asked for": KEEP_SIZE}
RENAMED_MEASUREMENTS = {"": NONE}  # a text, in the place of the choice


class SavePackedModel(io.ComfyNode):
    """Saves a model with its LoRAs and merges as a GGUF file, NF4 or one of ComfyUI's own types."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightSavePackedModel",
            display_name="Save Packed Model (Featherweight)",
            category="Featherweight",
            description="Saves a model with all its LoRAs and merges as a GGUF file, in one type or"
            " in the best types for a size, which loads here, in ComfyUI-GGUF and in"
            " stable-diffusion.cpp; as NF4; or in ComfyUI's own types (int8_convrot, fp8, mxfp8,"
            " nvfp4 …), which ComfyUI loads without this pack.",
            search_aliases=[
                "save model",
                "export model",
                "convert",
                "quantize",
                "quantise",
                "save gguf",
                "save nf4",
                "save fp8",
                "save int8",
                "save nvfp4",
                "merge save",
                "bake lora",
                "lora merge",
                "clip",
                "checkpoint save",
                *SAVING_WORDS,
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to save, packed or not, with all LoRAs and merges."
                ),
                renamed_combo(
                    "type",
                    OFFERED,
                    RENAMED_SAVE_TYPES,
                    default="Q4_K",
                    optional=True,
                    tooltip="The type of the large matrices; parts that must stay exact do so. Up"
                    " to Q2_K the file is a GGUF, with NF4 safetensors. keep types: each weight"
                    " keeps its type. mix for a size: the best mix of GGUF types, or of two of"
                    " ComfyUI's, for the size in GB. The last ones are ComfyUI's own, in a"
                    " safetensors file that ComfyUI loads by itself.",
                ),
                size_input("With mix for a size: the largest size the file may have, in GB of 10^9"
                           " bytes; 6 by default."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/ComfyUI",
                    optional=True,
                    display_name="file name",
                    tooltip="Folder and name. The type, a number and .gguf or .safetensors are"
                    " added. %model% is the file of the model; %date:yyyy-MM-dd% and"
                    " %KSampler.seed% work as in Save Image.",
                ),
                io.Combo.Input(
                    "folder",
                    options=[OUTPUT, MODELS],
                    default=OUTPUT,
                    optional=True,
                    tooltip="output: ComfyUI's output folder. Files in its diffusion_models and"
                    " text_encoders are listed among the models. models: the model folders; the"
                    " name begins with one of them.",
                ),
                renamed_combo(
                    "loras",
                    [KEEP_QUALITY, KEEP_SIZE],
                    RENAMED_LORAS,
                    default=KEEP_QUALITY,
                    optional=True,
                    display_name="LoRAs on packed weights",
                    tooltip="For LoRAs on a model that is quantized already. keep LoRA"
                    " quality (larger): the weights they change take Q6_K or more. keep the size:"
                    " they take the type asked for; the report says how much of each LoRA is kept.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    optional=True,
                    tooltip="Adds no number and replaces a file of the same name. Otherwise nothing"
                    " is ever overwritten.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Its text encoders are saved too, each in a file of its own in"
                    " text_encoders; with vae, in the file of the model.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Of earlier workflows; not used any more. Give the prompts to Measure"
                    " Sensitivity (Featherweight), and connect that to measurement.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Of earlier workflows; not used any more.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Makes the file a whole checkpoint, with this VAE and the text encoders"
                    " of clip. For ComfyUI's own types and keep types.",
                ),
                io.MultiType.Input(
                    renamed_combo(
                        "measurement",
                        [NONE, *list_measurements()],
                        RENAMED_MEASUREMENTS,
                        default=NONE,
                        optional=True,
                        tooltip="Connect Measure Sensitivity (Featherweight), or pick a measurement"
                        " of this model in output/sensitivity, or an imatrix (.gguf, .dat). The"
                        " model is packed much better with it.",
                    ),
                    types=[io.String],
                    extra_dict={REPLACED: "sensitivity"},
                ),
            ],
            accept_all_inputs=True,  # prompts of earlier versions have `sensitivity`
            outputs=[
                io.String.Output(display_name="path", tooltip="The file of the model."),
                io.String.Output(
                    display_name="report",
                    tooltip="What the file holds, how much of each LoRA is in it, which layers lose"
                    " the most, and a text for a model card.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, measurement=NONE):
        measurement = current(measurement, RENAMED_MEASUREMENTS)
        return measurement == NONE or validate_measurement(measurement)

    @classmethod
    def execute(
        cls,
        model,
        type="Q4_K",
        size_gb=DEFAULT_SIZE,
        filename_prefix="diffusion_models/ComfyUI",
        folder=OUTPUT,
        loras=KEEP_QUALITY,
        overwrite=False,
        clip=None,
        positive=None,
        latent=None,
        vae=None,
        measurement=NONE,
        sensitivity="",
        **hidden,
    ) -> io.NodeOutput:
        type = current(type, RENAMED_SAVE_TYPES)
        is_int4_product = type == INT4_PRODUCT
        type = W4A4 if is_int4_product else type
        keep_loras = current(loras, RENAMED_LORAS) == KEEP_QUALITY
        name = sensitivity or current(measurement, RENAMED_MEASUREMENTS)
        measured = None if name in (None, NONE) else load_measurement(find_sensitivity(name))
        if vae is not None:
            vae.throw_exception_if_invalid()
        for patcher in (model, *(part.patcher for part in (clip, vae) if part is not None)):
            check_saveable(patcher)
        if vae is None:
            model_source = source_of_model(model)
        else:
            model_source, clip = source_of_checkpoint(model, clip, vae), None
            filename_prefix = re.sub("^diffusion_models(?=[/\\\\])", "checkpoints", filename_prefix)
        if unsaved := unsaved_parts(model):
            model_source.notes.append(
                f"Not in the file, because it is not a weight: {', '.join(unsaved)}. Add the nodes"
                " for it after the loader of the file."
            )
        if type == W4A4:
            model_source.notes.append(
                "convrot_w4a4 loses more than Q4_K, which is about as large. It is for GPUs on"
                " which ComfyUI multiplies it faster.")
        if positive:
            is_measured = measured is not None and not measured.is_unused
            model_source.notes.append("The prompts at positive are not used any more: the model is"
                                      " packed " + (
                "by the measurement alone." if is_measured else "unmeasured; connect them to"
                " Measure Sensitivity (Featherweight), and that to measurement."))
        if not (measured or positive):
            loss = relative_error("Q4_K" if type in SIZES else type)
            model_source.notes += filter(None, [measuring_advice(loss)])
        filename_prefix = fill_in(filename_prefix, source_name(model),
                                  getattr(getattr(cls, "hidden", None), "prompt", None))
        row_types, target, label = (), type, type.replace(" ", "_")
        if type in SIZES:
            target = size_in_bytes(size_gb, "the largest size the file may have")
            row_types = SIZES[type]
            if row_types is None:
                row_types = best_mix(model_source, target, SaveOptions(measured))
            label = "_".join([f"{size_gb:g}GB", *row_types])

        def new_job(source, prefix: str, label: str, target: str | int) -> tuple:
            suffix = suffix_for(source, target, row_types)
            return source, new_model_path(prefix, label, suffix, folder, not overwrite), target

        jobs = [new_job(model_source, filename_prefix, label, target)]
        own_name = os.path.basename(filename_prefix.replace("\\", "/"))
        for name, source in ({} if clip is None else source_of_encoders(clip)).items():
            prefix = os.path.join("text_encoders", f"{own_name}_{name}")
            if type in SIZES:  # the size is the model's
                label = row_types[0] if row_types else "Q8_0"
            jobs.append(new_job(source, prefix, label, type if type == KEEP_TYPES else label))
        for _, path, _ in jobs:
            reject_own_files(path, *(source for source, _, _ in jobs))
        progress = Progress(*["packing"] * len(jobs))
        metadata = cls._metadata()
        files = []
        for source, path, target in jobs:
            options = SaveOptions(
                measured if source is model_source else None, keep_loras, metadata, overwrite,
                row_types, is_int4_product=is_int4_product
            )
            plan = plan_file(source, path, target, options)
            progress.set_heading(plan.short_text)
            files.append(save(plan, progress.track))
        show_text("\n\n".join(saved.short_text for saved in files))
        text = "\n\n".join(f"{saved.text}\n\n{saved.card}" for saved in files)
        return io.NodeOutput(jobs[0][1], text, ui=ui.PreviewText(text))

    @classmethod
    def _metadata(cls) -> dict[str, str]:
        """Returns the workflow, as the host's nodes write it into the files they save."""
        hidden = getattr(cls, "hidden", None)
        if args.disable_metadata or hidden is None:
            return {}
        texts = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
        return {key: json.dumps(value) for key, value in texts.items() if value is not None}
