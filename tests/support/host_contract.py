"""What this pack relies on of ComfyUI, held against the one that the tests run with: `changes` says
what that has changed.

Names of the host and how they are called are read from the pack's sources. Here stands what no
source says: the host's names of arguments that are given by position, and what is used of objects
that it hands over.
"""
import ast
import functools
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from featherweight.ops.layers.fused_calls import POSITIONAL, FusedCall
from featherweight.ops.patcher import PackedPatcher

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "__init__.py", *(path for layer in ("nodes", "cluster", "loaders", "ops")
                                   for path in sorted((ROOT / layer).rglob("*.py")))]
HOST_MODULES = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_kitchen", "comfyui_version",
    "execution", "folder_paths", "nodes", "server"
}
PATCHER = "comfy.model_patcher.ModelPatcherDynamic"

# Function of the host that gets two or more arguments by position, or that is called where no
# source shows it -> the parameters given by position, in their order, then behind * those given by
# name.
POSITIONS = {
    "comfy.float.stochastic_rounding": "value dtype * seed",
    "comfy.ldm.modules.attention.get_attention_function": "name default",
    "comfy.lora.calculate_shape": "patches weight key",
    "comfy.lora.calculate_weight": "patches weight key * original_weights",
    "comfy.lora.load_lora": "lora to_load * log_missing",
    "comfy.lora.model_lora_keys_clip": "model key_map",
    "comfy.lora.model_lora_keys_unet": "model key_map",
    "comfy.model_detection.convert_diffusers_mmdit": "state_dict output_prefix",
    "comfy.model_detection.detect_unet_config": "state_dict key_prefix",
    "comfy.model_detection.model_config_from_unet": "state_dict unet_key_prefix * metadata",
    "comfy.model_detection.unet_config_from_diffusers_unet": "state_dict",
    "comfy.model_management.free_memory": "memory_required device keep_loaded",
    "comfy.model_patcher.LazyCastingParam": "model key tensor",
    "comfy.model_patcher.LowVramPatch": "key patches convert_func set_func",
    "comfy.model_patcher.ModelPatcher": "model load_device offload_device",
    "comfy.model_patcher.get_key_weight": "model key",
    "comfy.ops.pick_operations": "weight_dtype compute_dtype * model_config",
    "comfy.ops.uncast_bias_weight": "s weight bias offload_stream",
    "comfy.sample.fix_empty_latent_channels": "model latent_image",
    "comfy.sample.prepare_noise": "latent_image seed",
    "comfy.sample.sample": "model noise steps cfg sampler_name scheduler positive negative"
    " latent_image * disable_pbar seed",
    "comfy.sd.load_checkpoint_guess_config": "ckpt_path * embedding_directory disable_dynamic"
    " model_options te_model_options output_model output_clip output_vae",
    "comfy.sd.load_clip": "ckpt_paths embedding_directory clip_type model_options disable_dynamic",
    "comfy.sd.load_state_dict_guess_config": "sd * embedding_directory metadata model_options"
    " te_model_options disable_dynamic output_model output_clip output_vae",
    "comfy.utils.get_attr": "obj attr",
    "comfy.utils.set_attr_param": "obj attr value",
    "comfy.weight_adapter.LoHaAdapter": "loaded_keys weights",
    "comfy.weight_adapter.LoRAAdapter": "loaded_keys weights",
    "comfy_kitchen.constraints.validate_function_call": "constraints kwargs * compute_capability",
    "comfy_kitchen.registry.registry.get_constraints": "backend_name func_name",
    "comfy_kitchen.tensor.BaseLayoutParams": "scale orig_dtype orig_shape",
    "comfy_kitchen.tensor.QuantizedTensor": "qdata layout_cls params",
    "comfy_kitchen.tensor.QuantizedTensor.__new__": "cls qdata layout_cls params",
    "comfy_kitchen.tensor.QuantizedTensor.__tensor_unflatten__": "inner_tensors ctx outer_size"
    " outer_stride",
    "comfy_kitchen.tensor.register_layout_class": "name cls",
    "comfy_kitchen.tensor.register_layout_op": "torch_op layout_cls",
    "execution.validate_prompt": "prompt_id prompt partial_execution_list",
    "folder_paths.cache_helper.get": "key default", "folder_paths.cache_helper.set": "key value",
    "folder_paths.get_full_path": "folder_name filename",
    "folder_paths.get_save_image_path": "filename_prefix output_dir",
}
TAKES_ANY = {"comfy_api.latest.io.NodeOutput"}  # by position

# Class of the host -> what is used of its objects: methods with their parameters, as above, and
# attributes.
MEMBERS = {
    "comfy.latent_formats.LatentFormat": {
        "latent_channels": None, "latent_dimensions": None, "spacial_downscale_ratio": None,
        "temporal_downscale_ratio": None
    }, "comfy.model_base.BaseModel": {
        "apply_model": "x t", "get_dtype_inference": "", "model_config": None,
        "model_sampling": None, "model_type": None
    }, "comfy.model_patcher.ModelPatcher": {
        "add_patches": "patches strength_patch", "cached_patcher_init": None,
        "clone": "disable_dynamic", "clone_base_uuid": None, "forced_hooks": None,
        "get_additional_models_with_key": "key", "get_attachment": "key",
        "get_model_object": "name", "hook_backup": None, "hook_patches": None, "injections": None,
        "is_dynamic": "", "is_multigpu_base_clone": None, "load_device": None, "model": None,
        "model_options": None, "model_size": "", "object_patches": None, "offload_device": None,
        "patches": None, "set_additional_models": "key models", "set_attachments": "key attachment",
        "set_model_unet_function_wrapper": "unet_wrapper_function", "weight_wrapper_patches": None,
        "wrappers": None
    }, "comfy.ops.CastWeightBiasOp": {"weight_function": None}, "comfy.ops.manual_cast.Embedding": {
        "forward_comfy_cast_weights": "input * out_dtype"
    }, "comfy.ops.manual_cast.Linear": {"forward_comfy_cast_weights": "input"}, "comfy.sd.CLIP": {
        "add_patches": "patches strength_patch", "clone": "", "cond_stage_model": None,
        "patcher": None
    },
    "comfy.sd.VAE": {"first_stage_model": None, "patcher": None, "throw_exception_if_invalid": ""},
    "comfy.supported_models_base.BASE": {"latent_format": None, "memory_usage_factor": None},
    "comfy.utils.ProgressBar": {"update_absolute": "value total preview"},
    "comfy.weight_adapter.WeightAdapterBase": {"loaded_keys": None, "weights": None},
    "comfy_api.latest.io.ComfyNode": {"FUNCTION": None, "GET_SCHEMA": ""},
    "comfy_kitchen.tensor.BaseLayoutParams": {"_tensor_fields": ""},
    "comfy_kitchen.tensor.QuantizedTensor": {
        "_layout_cls": None, "_params": None, "_qdata": None, "dequantize": "", "layout_cls": None
    }, "execution.PromptQueue": {
        "delete_history_item": "id_to_delete",
        "get_flags": "reset", "get_history": "prompt_id",
        "mutex": None, "put": "item", "set_flag": "name data"
    }, "server.PromptServer": {
        "add_on_prompt_handler": "handler", "client_id": None, "instance": None,
        "last_node_id": None, "prompt_queue": None, "publish_loop": "", "routes": None,
        "send_progress_text": "text node_id sid", "send_sync": "event data",
        "trigger_on_prompt": "json_data"
    }
}

FUSED = " ".join(FusedCall._fields)
EXPERTS = "num_experts in_features out_features bias device dtype"
# What this pack stands in for, calls with settings of its own or is called by -> the parameters of
# it that are known here. Layers of files in the host's own formats are of `MIXED`.
MIXED = "comfy.ops.mixed_precision_ops()"
KNOWN = {
    "comfy.ops.cast_bias_weight": "s input dtype device bias_dtype offloadable compute_dtype"
                                  " want_requant",
    "comfy.ops.disable_weight_init.Conv1d.forward_comfy_cast_weights": "input",
    "comfy.ops.disable_weight_init.Conv2d.forward_comfy_cast_weights": "input",
    "comfy.ops.disable_weight_init.Conv3d.forward_comfy_cast_weights": "input autopad",
    "comfy.ops.disable_weight_init.Embedding.forward": "input out_dtype",
    "comfy.ops.disable_weight_init.Embedding.forward_comfy_cast_weights": "input out_dtype",
    "comfy.ops.disable_weight_init.Linear.forward": f"input {FUSED}",
    "comfy.ops.disable_weight_init.Linear.forward_comfy_cast_weights": f"input {FUSED}",
    "comfy.ops.linear_input_act": f"linear x {FUSED}",
    f"{MIXED}.Linear.convert_weight": "weight inplace",
    f"{MIXED}.Linear.forward": f"input {FUSED}",
    f"{MIXED}.Linear.forward_comfy_cast_weights": f"input compute_dtype want_requant"
                                                  f" weight_only_quant {FUSED}",
    f"{MIXED}.Linear.set_weight": "weight inplace_update seed return_weight",
    f"{MIXED}.MoEExperts.__init__": EXPERTS,
    f"{MIXED}.MoEExperts.bank_resident": "input",
    f"{MIXED}.MoEExperts.expert_linear": f"input i {FUSED}",
}

# Module of the host -> words in its source: attributes that it sets on models, modules and layers,
# and names that `loaders.comfyui.layer_classes` gives its functions another value of.
MARKS = {
    "comfy.clip_vision": "ClipVisionModel load_torch_file manual_cast",
    "comfy.model_patcher": "_v _v_signature bias_function comfy_cast_weights"
    " comfy_force_cast_weights comfy_patched_weights current_weight_patches_uuid device"
    " dynamic_vbars model_loaded_weight_memory model_offload_buffer_memory move_to"
    " prev_comfy_cast_weights weight_function",
    "comfy.ops": "_full_precision_mm _lowvram_function _v_bias _v_weight comfy_cast_weights"
                 " factory_kwargs quant_config",
    "comfy_extras.nodes_model_patch": "denoise_encoder_sd get_full_path_or_raise load_torch_file"
                                      " manual_cast"
}


# --- what the pack uses ---

@functools.cache  # parsing the pack takes seconds
def used_names() -> dict[str, list[tuple[Path, ast.Call | None]]]:
    """Return each name of the host in the pack's sources -> the files that use it, with the call
    where it is one."""
    found = {}
    for path in SOURCES:
        names = names_in(ast.parse(path.read_text(encoding="utf-8")))
        for name, calls in names.items():
            found.setdefault(name, []).extend((path, call) for call in calls or [None])
    for path, name, call in patcher_uses():
        found.setdefault(f"{PATCHER}.{name}", []).append((path, call))
    return found


def names_in(tree: ast.AST) -> dict[str, list[ast.Call]]:
    """Return the dotted names of the host that a source uses -> their calls."""
    aliases, found = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in HOST_MODULES:
                    whole = alias.name if alias.asname else alias.name.split(".")[0]
                    aliases[alias.asname or whole] = whole
        elif (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and node.module.split(".")[0] in HOST_MODULES
        ):
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.setdefault(f"{node.module}.{alias.name}", [])
    for node in ast.walk(tree):
        is_call = isinstance(node, ast.Call)
        name = (
            _dotted(node.func if is_call else node, aliases)
            if is_call or isinstance(node, ast.Attribute)
            else None
        )
        if name:
            found.setdefault(name, []).extend([node] if is_call else [])
    return {
        name: calls for name, calls in found.items()
        if calls or not any(other.startswith(f"{name}.") for other in found)
    }


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    attributes = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(attributes)])


def patcher_uses() -> Iterator[tuple[Path, str, ast.Call | None]]:
    """Yield what the patcher takes from the host's: attributes of itself that are not its own, and
    methods behind super().

    What it hands its work to calls it `patcher`.
    """
    own, folder = set(vars(PackedPatcher)), Path(inspect.getfile(PackedPatcher)).parent
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bodies = [(tree, "patcher")]
        bodies += [(node, name) for node in tree.body
                   if isinstance(node, ast.ClassDef) and node.name == PackedPatcher.__name__
                   for name in ("self", "super()")]
        for body, name in bodies:
            calls = {id(node.func): node for node in ast.walk(body) if isinstance(node, ast.Call)}
            for node in ast.walk(body):
                if not isinstance(node, ast.Attribute) or ast.unparse(node.value) != name:
                    continue
                if name == "super()" or (node.attr not in own and not node.attr.startswith("__")):
                    yield path, node.attr, calls.get(id(node))


# --- what the host has ---

def changes() -> dict[str, str]:
    """Return each name that this ComfyUI lacks, or that does not take what it is given -> what is
    wrong, and who uses it."""
    found = {}
    for name, uses in used_names().items():
        parameters = (
            [POSITIONS[name]]
            if name in POSITIONS
            else [_given(call) for _, call in uses if name not in TAKES_ANY]
        )
        if problem := next(filter(None, (_problem(name, given) for given in parameters or [None])),
                           ""):
            files = sorted({path.relative_to(ROOT).as_posix() for path, _ in uses})
            found[name] = f"{problem}, which {', '.join(files)} use"
    members = {
        f"{owner}.{name}": given for owner, names in MEMBERS.items()
        for name, given in names.items()
    }
    found |= {
        name: problem for name, given in members.items() if (problem := _problem(name, given))
    }
    found |= {name: problem for name in KNOWN if (problem := _unknown_parameters(name))}
    for module, words in MARKS.items():
        pkgutil.resolve_name(module)
        found |= {
            f"{module}: {word}": "is gone" for word in words.split()
            if not re.search(rf"\b{word}\b", source(module))
        }
    return found


def _given(call: ast.Call | None) -> str | None:
    """The parameters of a call, as in `POSITIONS`; those by position have no names of their own.
    None where it has a star."""
    if call is None or any(isinstance(value, ast.Starred) for value in call.args):
        return None
    keywords = filter(None, (keyword.arg for keyword in call.keywords))
    return " ".join([*(f"_{index}" for index in range(len(call.args))), "*", *keywords])


def _problem(name: str, parameters: str | None) -> str:
    parent, _, last = name.rpartition(".")
    try:
        value, owner = pkgutil.resolve_name(name), pkgutil.resolve_name(parent)
    except (ImportError, AttributeError):
        return "" if _is_set_on_objects(parent, last) else "is gone"
    try:
        signature = inspect.signature(value) if parameters is not None else None
    except (TypeError, ValueError):  # native code says nothing about itself
        return ""
    if signature is None:
        return ""
    by_position, _, by_name = (words.split() for words in parameters.partition("*"))
    is_method = isinstance(owner, type) and inspect.isfunction(inspect.getattr_static(owner, last))
    by_position = [*(["self"] if is_method and by_position[:1] != ["cls"] else []), *by_position]
    try:
        signature.bind(*by_position, **dict.fromkeys(by_name))
    except TypeError as error:
        return f"takes other parameters ({error})"
    known = list(signature.parameters)[:len(by_position)]
    same = all(ours in (theirs, "self") or ours.startswith("_")
               for ours, theirs in zip(by_position, known))
    return "" if same else f"takes other parameters ({', '.join(known)})"


def _unknown_parameters(name: str) -> str:
    """What a function in `KNOWN` takes that this pack neither takes in its place nor hands on."""
    owner, call, rest = name.partition("()")
    try:
        function = pkgutil.resolve_name(owner if call else name)
        for part in filter(None, rest.split(".")):
            function = getattr(function() if inspect.isfunction(function) else function, part)
    except AttributeError:
        return ""  # an older host lacks it; names that are used are in the other lists
    parameters = [parameter for parameter in inspect.signature(function).parameters.values()
                  if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]
    given = [parameter.name for parameter in parameters if parameter.name != "self"]
    unknown = sorted(set(given) - set(KNOWN[name].split()))
    if unknown:
        return f"takes other parameters ({', '.join(unknown)} is unknown here)"
    fused = [parameter for parameter in given if parameter in FusedCall._fields]
    order = FusedCall._fields if name.endswith("linear_input_act") else POSITIONAL
    if fused != [parameter for parameter in order if parameter in fused]:
        return f"takes its parameters in another order ({', '.join(fused)})"
    return ""


def _is_set_on_objects(parent: str, word: str) -> bool:
    """Whether the modules that define a class, and those it derives from, set an attribute of that
    name."""
    try:
        owner = pkgutil.resolve_name(parent)
    except (ImportError, AttributeError):
        return False
    modules = {base.__module__ for base in owner.__mro__} if isinstance(owner, type) else set()
    return any(re.search(rf"\.{word}\b|\n    {word}\b", source(module)) for module in modules
               if module.split(".")[0] in HOST_MODULES)


@functools.cache
def source(module: str) -> str:
    """Return the text of a module that is imported."""
    return Path(sys.modules[module].__file__).read_text(encoding="utf-8")
