"""What this pack relies on of ComfyUI: one list of names and parameters, held against the ComfyUI that runs.

The look at them takes milliseconds and imports nothing: what the host has not imported yet is only looked for as a file. Where
something is missing, this pack's own source tells which nodes need it. Standard library only.

"""
import ast
import functools
import importlib.machinery
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOST_MODULES = {"comfy", "comfy_api", "comfy_execution", "comfy_kitchen", "comfyui_version", "execution", "folder_paths",
                "nodes", "server"}

# Name -> the parameters that are given by position, in their order, then behind * those given by name. None: only the name.
NAMES = {
    "comfy.cli_args.PerformanceFeature.Fp16Accumulation": None,
    "comfy.cli_args.args.cpu": None,
    "comfy.cli_args.args.disable_metadata": None,
    "comfy.cli_args.args.fast": None,
    "comfy.cli_args.args.preview_method.value": None,
    "comfy.float.stochastic_rounding": "value dtype * seed",
    "comfy.hooks.EnumHookMode.MaxSpeed": None,
    "comfy.ldm.models.autoencoder.AutoencodingEngine": None,
    "comfy.ldm.modules.attention.get_attention_function": "name default",
    "comfy.ldm.wan.vae.WanVAE": None,
    "comfy.lora.calculate_shape": "patches weight key",
    "comfy.lora.calculate_weight": "patches weight key * original_weights",
    "comfy.lora.load_lora": "lora to_load * log_missing",
    "comfy.lora.model_lora_keys_clip": "model key_map",
    "comfy.lora.model_lora_keys_unet": "model key_map",
    "comfy.lora_convert.convert_lora": "sd",
    "comfy.lora_convert.convert_uso_lora": "sd",
    "comfy.model_detection.convert_diffusers_mmdit": "state_dict output_prefix",
    "comfy.model_detection.detect_unet_config": "state_dict key_prefix",
    "comfy.model_detection.model_config_from_unet": "state_dict unet_key_prefix * metadata",
    "comfy.model_detection.unet_config_from_diffusers_unet": "state_dict",
    "comfy.model_detection.unet_prefix_from_state_dict": "state_dict",
    "comfy.model_management.MAX_PINNED_MEMORY": None,
    "comfy.model_management.NUM_STREAMS": None,
    "comfy.model_management.TOTAL_PINNED_MEMORY": None,
    "comfy.model_management.cuda_device_context": "device",
    "comfy.model_management.get_all_torch_devices": "",
    "comfy.model_management.get_free_memory": "dev",
    "comfy.model_management.get_gpu_device_options": "",
    "comfy.model_management.get_total_memory": "dev",
    "comfy.model_management.is_device_cpu": "device",
    "comfy.model_management.load_models_gpu": "models * memory_required",
    "comfy.model_management.minimum_inference_memory": "",
    "comfy.model_management.pin_memory": "tensor",
    "comfy.model_management.synchronize": "",
    "comfy.model_management.throw_exception_if_processing_interrupted": "",
    "comfy.model_management.unpin_memory": "tensor",
    "comfy.model_patcher.LazyCastingParam": "model key tensor",
    "comfy.model_patcher.LowVramPatch": "key patches convert_func set_func",
    "comfy.model_patcher.ModelPatcher": None,
    "comfy.model_patcher.get_key_weight": "model key",
    "comfy.ops.CastWeightBiasOp": None,
    "comfy.ops.cast_bias_weight": "s * dtype device bias_dtype offloadable compute_dtype",
    "comfy.ops.disable_weight_init": None,
    "comfy.ops.manual_cast": None,
    "comfy.ops.manual_cast.Conv1d": None,
    "comfy.ops.manual_cast.Conv2d": None,
    "comfy.ops.manual_cast.Conv3d": None,
    "comfy.ops.manual_cast.Embedding": None,
    "comfy.ops.manual_cast.Linear": None,
    "comfy.ops.mixed_precision_ops": "* compute_dtype",
    "comfy.ops.pick_operations": "weight_dtype compute_dtype * model_config",
    "comfy.ops.run_every_op": "",
    "comfy.ops.uncast_bias_weight": "s weight bias offload_stream",
    "comfy.patcher_extension.CallbacksMP.ON_LOAD": None,
    "comfy.quant_ops.QUANT_ALGOS": None,
    "comfy.sample.fix_empty_latent_channels": "model latent_image",
    "comfy.sample.prepare_noise": "latent_image seed",
    "comfy.sample.sample": "model noise steps cfg sampler_name scheduler positive negative latent_image * disable_pbar seed",
    "comfy.options.enable_args_parsing": "",
    "comfy.sd.CLIP": None,
    "comfy.sd.CLIPType": None,
    "comfy.sd.CLIPType.STABLE_DIFFUSION": None,
    "comfy.sd.VAE": "* sd device metadata",
    "comfy.sd.detect_te_model": "sd",
    "comfy.sd.load_checkpoint_guess_config": "ckpt_path * embedding_directory disable_dynamic model_options te_model_options"
                                             " output_model output_clip output_vae",
    "comfy.sd.load_clip": "ckpt_paths embedding_directory clip_type model_options disable_dynamic",
    "comfy.sd.load_diffusion_model": "unet_path * model_options disable_dynamic",
    "comfy.sd.load_diffusion_model_state_dict": "sd * model_options metadata disable_dynamic",
    "comfy.sd.load_state_dict_guess_config": "sd * embedding_directory metadata model_options te_model_options disable_dynamic"
                                             " output_model output_clip output_vae",
    "comfy.sd.load_text_encoder_state_dicts": "state_dicts * embedding_directory clip_type model_options disable_dynamic",
    "comfy.taesd.taesd.TAESD": None,
    "comfy.text_encoders.lt.sd_detect": "state_dict_list",
    "comfy.utils.ProgressBar": "total",
    "comfy.utils.convert_old_quants": "state_dict * model_prefix metadata",
    "comfy.utils.get_attr": "obj attr",
    "comfy.utils.load_torch_file": "ckpt * safe_load return_metadata",
    "comfy.utils.set_attr_param": "obj attr value",
    "comfy.weight_adapter.BOFTAdapter": None,
    "comfy.weight_adapter.GLoRAAdapter": None,
    "comfy.weight_adapter.LoHaAdapter": "loaded_keys weights",
    "comfy.weight_adapter.LoKrAdapter": None,
    "comfy.weight_adapter.LoRAAdapter": "loaded_keys weights",
    "comfy.weight_adapter.OFTAdapter": None,
    "comfy.weight_adapter.WeightAdapterBase": None,
    "comfy_api.latest.ComfyExtension": None,
    "comfy_api.latest.io.Boolean.Input": "id * display_name optional tooltip default advanced",
    "comfy_api.latest.io.Clip.Input": "id * optional tooltip",
    "comfy_api.latest.io.Clip.Output": "* tooltip",
    "comfy_api.latest.io.Combo.Input": "id * options display_name optional tooltip default advanced",
    "comfy_api.latest.io.ComfyNode": None,
    "comfy_api.latest.io.Conditioning.Input": "id * optional tooltip",
    "comfy_api.latest.io.Float.Input": "id * default min max step display_name optional tooltip advanced",
    "comfy_api.latest.io.Hidden.dynprompt": None,
    "comfy_api.latest.io.Hidden.extra_pnginfo": None,
    "comfy_api.latest.io.Hidden.prompt": None,
    "comfy_api.latest.io.Image.Input": "id * lazy raw_link tooltip",
    "comfy_api.latest.io.Image.Output": "* display_name tooltip",
    "comfy_api.latest.io.Int.Input": "id * control_after_generate default min max optional tooltip",
    "comfy_api.latest.io.Latent.Input": "id * optional tooltip",
    "comfy_api.latest.io.Model.Input": "id * optional tooltip",
    "comfy_api.latest.io.Model.Output": "",
    "comfy_api.latest.io.NodeOutput": "* ui",
    "comfy_api.latest.io.Schema": "* node_id display_name category description search_aliases inputs outputs is_output_node"
                                  " is_input_list is_deprecated hidden",
    "comfy_api.latest.io.String.Input": "id * default force_input multiline optional tooltip",
    "comfy_api.latest.io.String.Output": "* display_name tooltip",
    "comfy_api.latest.io.Vae.Output": "* tooltip",
    "comfy_api.latest.ui.PreviewImage": "image * cls",
    "comfy_api.latest.ui.PreviewText": "value",
    "comfy_execution.utils.get_executing_context": "",
    "comfy_kitchen.tensor.BaseLayoutParams": "scale orig_dtype orig_shape",
    "comfy_kitchen.tensor.QuantizedLayout": None,
    "comfy_kitchen.tensor.QuantizedTensor": "qdata layout_cls params",
    "comfy_kitchen.tensor.QuantizedTensor.__new__": "cls qdata layout_cls params",
    "comfy_kitchen.tensor.QuantizedTensor.__tensor_unflatten__": "inner_tensors ctx outer_size outer_stride",
    "comfy_kitchen.tensor.base.dequantize_args": "args",
    "comfy_kitchen.tensor.get_layout_class": "name",
    "comfy_kitchen.tensor.register_layout_class": "name cls",
    "comfy_kitchen.tensor.register_layout_op": "torch_op layout_cls",
    "comfyui_version.__version__": None,
    "execution.validate_prompt": "prompt_id prompt partial_execution_list",
    "folder_paths.__file__": None,
    "folder_paths.folder_names_and_paths": None,
    "folder_paths.get_filename_list": "folder_name",
    "folder_paths.get_folder_paths": "folder_name",
    "folder_paths.get_full_path": "folder_name filename",
    "folder_paths.get_input_directory": "",
    "folder_paths.get_output_directory": "",
    "folder_paths.get_save_image_path": "filename_prefix output_dir",
    "folder_paths.supported_pt_extensions": None,
    "nodes.NODE_CLASS_MAPPINGS": None,
    "nodes.interrupt_processing": "",
    "server.PromptServer.instance.add_on_prompt_handler": "handler",
    "server.PromptServer.instance.routes.get": "path",
    "server.PromptServer.instance.send_progress_text": "text node_id",
}

# File of this pack -> what it uses of objects that the host hands it: methods, and attributes the host sets.
MEMBERS = {
    "loaders/lora/apply.py": {
        "comfy.model_patcher.ModelPatcher.add_patches": "patches strength_patch",
        "comfy.model_patcher.ModelPatcher.clone": "",
        "comfy.model_patcher.ModelPatcher.set_attachments": "key attachment",
        "comfy.sd.CLIP.add_patches": "patches strength_patch",
        "comfy.sd.CLIP.clone": "",
        "comfy.sd.CLIP.patcher": None,
    },
    "loaders/lora/fit.py": {"comfy.sd.CLIP.cond_stage_model": None},
    "loaders/handover.py": {
        "comfy.model_base.BaseModel.get_dtype_inference": "",
        "comfy.model_patcher.ModelPatcher.load_device": None,
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.sd.CLIP.patcher": None,
    },
    "loaders/inspect/contents.py": {
        "comfy.model_base.BaseModel.model_config": None,
        "comfy.model_patcher.ModelPatcher.cached_patcher_init": None,
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.model_size": "",
        "comfy.model_patcher.ModelPatcher.patches": None,
    },
    "loaders/inspect/difference.py": {"comfy_kitchen.tensor.QuantizedTensor.dequantize": ""},
    "loaders/inspect/needs.py": {
        "comfy.supported_models_base.BASE.latent_format": None,
        "comfy.supported_models_base.BASE.memory_usage_factor": None,
        "comfy.latent_formats.LatentFormat.latent_dimensions": None,
        "comfy.latent_formats.LatentFormat.spacial_downscale_ratio": None,
        "comfy.latent_formats.LatentFormat.temporal_downscale_ratio": None,
    },
    "loaders/packing/obstacles.py": {
        f"comfy.model_patcher.ModelPatcher.{name}": None for name in (
            "forced_hooks", "hook_backup", "hook_patches", "injections", "model_options", "object_patches",
            "weight_wrapper_patches", "wrappers")
    },
    "loaders/packing/measuring.py": {"comfy.model_patcher.ModelPatcher.load_device": None},
    "loaders/packing/runs.py": {
        "comfy.latent_formats.LatentFormat.latent_channels": None,
        "comfy.latent_formats.LatentFormat.latent_dimensions": None,
        "comfy.latent_formats.LatentFormat.spacial_downscale_ratio": None,
        "comfy.model_base.BaseModel.apply_model": "x t",
        "comfy.model_patcher.ModelPatcher.clone": "",
        "comfy.model_patcher.ModelPatcher.get_model_object": "name",
        "comfy.model_patcher.ModelPatcher.model_options": None,
        "comfy.model_patcher.ModelPatcher.set_model_unet_function_wrapper": "unet_wrapper_function",
    },
    "loaders/packing/source.py": {
        "comfy.model_base.BaseModel.model_sampling": None,
        "comfy.model_base.BaseModel.model_type": None,
        "comfy.model_patcher.ModelPatcher.get_model_object": "name",
        "comfy.model_patcher.ModelPatcher.load_device": None,
        "comfy.model_patcher.ModelPatcher.patches": None,
        "comfy.sd.CLIP.patcher": None,
    },
    "loaders/held.py": {
        "comfy.model_patcher.ModelPatcher.get_attachment": "key",
        "comfy.model_patcher.ModelPatcher.load_device": None,
    },
    "loaders/packing/while_loading.py": {
        "comfy.model_patcher.ModelPatcher.set_attachments": "key attachment",
        "comfy_kitchen.tensor.QuantizedTensor.dequantize": "",
    },
    "loaders/placing.py": {
        "comfy.model_patcher.ModelPatcher.clone": "disable_dynamic",
        "comfy.model_patcher.ModelPatcher.clone_base_uuid": None,
        "comfy.model_patcher.ModelPatcher.get_additional_models_with_key": "key",
        "comfy.model_patcher.ModelPatcher.is_dynamic": "",
        "comfy.model_patcher.ModelPatcher.load_device": None,
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.set_additional_models": "key models",
        "comfy.sd.CLIP.clone": "",
        "comfy.sd.CLIP.cond_stage_model": None,
        "comfy.sd.CLIP.patcher": None,
    },
    "loaders/progress.py": {"comfy.utils.ProgressBar.update_absolute": "value"},
    "loaders/recipe.py": {"comfy.model_patcher.ModelPatcher.cached_patcher_init": None},
    "loaders/text_encoder.py": {"comfy.sd.CLIP.patcher": None},
    "loaders/vae.py": {
        "comfy.model_patcher.ModelPatcher.offload_device": None,
        "comfy.sd.VAE.first_stage_model": None,
        "comfy.sd.VAE.patcher": None,
        "comfy.sd.VAE.throw_exception_if_invalid": "",
    },
    "machines/host.py": {
        "execution.PromptQueue.currently_running": None,
        "execution.PromptQueue.delete_history_item": "id_to_delete",
        "execution.PromptQueue.delete_queue_item": "function",
        "execution.PromptQueue.get_flags": "reset",
        "execution.PromptQueue.get_history": "prompt_id",
        "execution.PromptQueue.mutex": None,
        "execution.PromptQueue.put": "item",
        "execution.PromptQueue.set_flag": "name data",
        "server.PromptServer.last_node_id": None,
        "server.PromptServer.prompt_queue": None,
        "server.PromptServer.publish_loop": "",
        "server.PromptServer.sockets": None,
        "server.PromptServer.sockets_metadata": None,
        "server.PromptServer.trigger_on_prompt": "json_data",
    },
    "nodes/__init__.py": {"comfy_api.latest.io.ComfyNode.GET_SCHEMA": ""},
    "nodes/legacy_calcuis.py": {"comfy_api.latest.io.ComfyNode.FUNCTION": None},
    "nodes/legacy_gguf.py": {"comfy_api.latest.io.ComfyNode.FUNCTION": None},
    "nodes/legacy_gguf_clip.py": {"comfy_api.latest.io.ComfyNode.FUNCTION": None},
    "nodes/legacy_kj.py": {"comfy.model_patcher.ModelPatcher.model_options": None},
    "nodes/legacy_multigpu_checkpoint.py": {"comfy_api.latest.io.ComfyNode.FUNCTION": None},
    "nodes/legacy_nf4.py": {"comfy_api.latest.io.ComfyNode.FUNCTION": None},
    "nodes/legacy_sp.py": {"comfy_api.latest.io.ComfyNode.FUNCTION": None},
    "nodes/multigpu.py": {
        "comfy.model_patcher.ModelPatcher.load_device": None,
        "comfy.model_patcher.ModelPatcher.model_size": "",
        "comfy.sd.CLIP.cond_stage_model": None,
        "comfy.sd.CLIP.patcher": None,
        "comfy.sd.VAE.first_stage_model": None,
        "comfy_api.latest.io.ComfyNode.FUNCTION": None,
    },
    "nodes/place_model.py": {
        "comfy.model_patcher.ModelPatcher.get_additional_models_with_key": "key",
        "comfy.model_patcher.ModelPatcher.is_multigpu_base_clone": None,
        "comfy.model_patcher.ModelPatcher.load_device": None,
    },
    "nodes/run_on_ray.py": {"comfy.utils.ProgressBar.update_absolute": "value total preview"},
    "ops/host_formats.py": {
        "comfy.ops.manual_cast.Linear.forward_comfy_cast_weights": "input",
        "comfy_kitchen.tensor.QuantizedTensor.dequantize": "",
    },
    "ops/layers.py": {
        "comfy.ops.CastWeightBiasOp.weight_function": None,
        "comfy.ops.manual_cast.Embedding.forward_comfy_cast_weights": "input * out_dtype",
    },
    "ops/patcher/__init__.py": {
        "comfy.model_patcher.ModelPatcher.clone": None,
        "comfy.model_patcher.ModelPatcher.size": None,
    },
    "ops/patcher/applying.py": {
        "comfy.model_base.BaseModel.get_dtype_inference": "",
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.object_patches": None,
        "comfy.model_patcher.ModelPatcher.patches": None,
        "comfy.model_patcher.ModelPatcher.weight_wrapper_patches": None,
    },
    "ops/patcher/first_step.py": {
        "comfy.model_patcher.ModelPatcher.cached_hook_patches": None,
        "comfy.model_patcher.ModelPatcher.cleanup": "",
        "comfy.model_patcher.ModelPatcher.current_hooks": None,
        "comfy.model_patcher.ModelPatcher.detach": "",
        "comfy.model_patcher.ModelPatcher.is_dynamic": "",
        "comfy.model_patcher.ModelPatcher.load": "device_to lowvram_model_memory * full_load",
        "comfy.model_patcher.ModelPatcher.load_device": None,
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.model_size": "",
        "comfy.model_patcher.ModelPatcher.prepare_state": "timestep model_options",
    },
    "ops/patcher/hooks.py": {
        "comfy.model_patcher.ModelPatcher.cached_hook_patches": None,
        "comfy.model_patcher.ModelPatcher.hook_backup": None,
        "comfy.model_patcher.ModelPatcher.hook_mode": None,
        "comfy.model_patcher.ModelPatcher.is_dynamic": "",
        "comfy.model_patcher.ModelPatcher.load_device": None,
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.patch_cached_hook_weights": "cached_weights key memory_counter",
        "comfy.model_patcher.ModelPatcher.patch_hook_weight_to_device":
            "hooks combined_patches key original_weights memory_counter",
        "comfy.model_patcher.ModelPatcher.unpatch_hooks": "whitelist_keys_set",
        "comfy.model_patcher.ModelPatcher.unpin_weight": "key",
    },
    "ops/patcher/loading.py": {
        "comfy.model_patcher.ModelPatcher.apply_hooks": "hooks * force_apply",
        "comfy.model_patcher.ModelPatcher.backup": None,
        "comfy.model_patcher.ModelPatcher.cleanup": "",
        "comfy.model_patcher.ModelPatcher.current_hooks": None,
        "comfy.model_patcher.ModelPatcher.detach": "unpatch_all",
        "comfy.model_patcher.ModelPatcher.force_cast_weights": None,
        "comfy.model_patcher.ModelPatcher.forced_hooks": None,
        "comfy.model_patcher.ModelPatcher.get_all_callbacks": "call_type",
        "comfy.model_patcher.ModelPatcher.is_dynamic": "",
        "comfy.model_patcher.ModelPatcher.load": "device_to lowvram_model_memory force_patch_weights full_load",
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.loaded_size": "",
        "comfy.model_patcher.ModelPatcher.model_size": "",
        "comfy.model_patcher.ModelPatcher.offload_device": None,
        "comfy.model_patcher.ModelPatcher.partially_load": "device_to extra_memory force_patch_weights",
        "comfy.model_patcher.ModelPatcher.partially_unload": None,
        "comfy.model_patcher.ModelPatcher.partially_unload_ram": "ram_to_unload",
        "comfy.model_patcher.ModelPatcher.patch_hooks": "hooks",
        "comfy.model_patcher.ModelPatcher.patch_weight_to_device": "key device_to inplace_update return_weight force_cast",
        "comfy.model_patcher.ModelPatcher.patches": None,
        "comfy.model_patcher.ModelPatcher.patches_uuid": None,
        "comfy.model_patcher.ModelPatcher.unpatch_hooks": "whitelist_keys_set",
        "comfy.model_patcher.ModelPatcher.unpatch_model": "device_to unpatch_weights",
        "comfy.model_patcher.ModelPatcher.use_ejected": "* skip_and_inject_on_exit_only",
        "comfy.model_patcher.ModelPatcher.weight_wrapper_patches": None,
        "comfy.model_patcher.ModelPatcherDynamic.load": "device_to lowvram_model_memory",
        "comfy.model_patcher.ModelPatcherDynamic.restore_loaded_backups": "",
    },
    "ops/patcher/pinning.py": {
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.pin_weight_to_device": "key",
        "comfy.model_patcher.ModelPatcher.pinned": None,
        "comfy.model_patcher.ModelPatcher.unpin_weight": "key",
    },
    "ops/patcher/placing.py": {
        "comfy.model_patcher.ModelPatcher._load_list": "for_dynamic default_device",
        "comfy.model_patcher.ModelPatcher.cleanup": "",
        "comfy.model_patcher.ModelPatcher.get_free_memory": "device",
        "comfy.model_patcher.ModelPatcher.is_dynamic": "",
        "comfy.model_patcher.ModelPatcher.load_device": None,
        "comfy.model_patcher.ModelPatcher.loaded_size": "",
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.model_size": "",
        "comfy.model_patcher.ModelPatcher.offload_device": None,
        "comfy.model_patcher.ModelPatcher.partially_load": "device_to extra_memory force_patch_weights",
        "comfy.model_patcher.ModelPatcher.partially_unload": "device_to memory_to_free force_patch_weights",
        "comfy.model_patcher.ModelPatcher.unpin_weight": "key",
        "comfy.model_patcher.ModelPatcherDynamic._vbar_get": "",
    },
    "ops/patcher/settling.py": {
        "comfy.model_patcher.ModelPatcher._load_list": "",
        "comfy.model_patcher.ModelPatcher.backup": None,
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.offload_device": None,
        "comfy.model_patcher.ModelPatcher.partially_unload": "device_to memory_to_free",
        "comfy.model_patcher.ModelPatcher.patches_uuid": None,
        "comfy.model_patcher.ModelPatcher.pin_weight_to_device": "key",
    },
    "ops/patcher/saving.py": {
        "comfy.model_patcher.ModelPatcher.backup": None,
        "comfy.model_patcher.ModelPatcher.get_key_patches": "filter_prefix",
        "comfy.model_patcher.ModelPatcher.model": None,
        "comfy.model_patcher.ModelPatcher.model_state_dict": "filter_prefix",
        "comfy.model_patcher.ModelPatcher.model_state_dict_for_saving": "model prefix",
        "comfy.model_patcher.ModelPatcher.offload_device": None,
        "comfy.model_patcher.ModelPatcher.patch_weight_to_device": "key device_to inplace_update return_weight force_cast",
    },
    "ops/patcher/values.py": {
        f"comfy.model_patcher.ModelPatcher.{name}": None for name in ("backup", "hook_backup", "model", "patches")
    },
    "ops/tensor.py": {
        "comfy_kitchen.tensor.BaseLayoutParams._tensor_fields": "",
        "comfy_kitchen.tensor.QuantizedTensor._layout_cls": None,
        "comfy_kitchen.tensor.QuantizedTensor._params": None,
        "comfy_kitchen.tensor.QuantizedTensor._qdata": None,
        "comfy_kitchen.tensor.QuantizedTensor.layout_cls": None,
    },
    "ops/adapters.py": {
        "comfy.weight_adapter.WeightAdapterBase.loaded_keys": None,
        "comfy.weight_adapter.WeightAdapterBase.weights": None,
    },
}

# File of this pack -> module of the host -> words in its source: attributes that it sets on models, modules and layers.
MARKS = {
    "ops/host_formats.py": {"comfy.ops": "_full_precision_mm factory_kwargs"},
    "ops/layers.py": {"comfy.ops": "comfy_cast_weights"},
    "ops/operations.py": {"comfy.ops": "quant_config"},
    "ops/patcher/applying.py": {"comfy.model_patcher": "model_loaded_weight_memory weight_function"},
    "ops/patcher/loading.py": {
        "comfy.model_patcher": "_v _v_signature comfy_cast_weights comfy_force_cast_weights comfy_patched_weights"
                               " current_weight_patches_uuid device model_loaded_weight_memory",
        "comfy.ops": "_lowvram_function",
    },
    "ops/patcher/placing.py": {
        "comfy.model_patcher": "_v _v_signature comfy_cast_weights comfy_patched_weights dynamic_vbars"
                               " model_loaded_weight_memory model_offload_buffer_memory",
        "comfy.ops": "_v_bias _v_weight",
    },
    "ops/patcher/settling.py": {
        "comfy.model_patcher": "bias_function comfy_cast_weights comfy_patched_weights current_weight_patches_uuid device"
                               " model_loaded_weight_memory model_offload_buffer_memory move_to prev_comfy_cast_weights"
                               " weight_function",
    },
}

# Names without which every node stays, and what goes.
WITHOUT = {
    "comfy.float.stochastic_rounding": "other nodes cannot write a packed model's weights",
    "comfy.hooks.EnumHookMode.MaxSpeed": "hooks with a LoRA do not work on packed models",
    "comfy.ops.mixed_precision_ops": "packed files that also hold weights in ComfyUI's own formats do not load",
    "comfy.ops.pick_operations": "packed files that also hold weights in ComfyUI's own formats do not load",
    "comfy.ops.run_every_op": "packed files that also hold weights in ComfyUI's own formats do not load",
    "comfy_execution.utils.get_executing_context": "nodes show no text on themselves",
    "server.PromptServer.instance.add_on_prompt_handler": "Run on Ray needs the model files on this machine too",
    "server.PromptServer.instance.routes.get": "nodes under the ids of some other packs have no help page",
    "server.PromptServer.instance.send_progress_text": "nodes show no text on themselves",
}


# --- what the host has ---

def changes(strict: bool = False) -> dict[str, str]:
    """Name that this ComfyUI lacks, or that does not take what it is given -> what is wrong with it, such as "is gone".

    strict: parameters given by position have their names too. Other packs put functions of their own in the host's place,
    which may call them something else.
    """
    listed = [*NAMES.items(), *(entry for members in MEMBERS.values() for entry in members.items())]
    found = {name: problem for name, parameters in listed if (problem := _problem(name, parameters, strict))}
    for marks in MARKS.values():
        for module, words in marks.items():
            source = _source(module)
            found |= {f"{module}: {word}": "is gone" for word in words.split()
                      if source and not re.search(rf"{word}\b", source)}
    _source.cache_clear()
    return found


def _problem(name: str, parameters: str | None, strict: bool) -> str:
    try:
        value, owner = _resolved(name)
        if parameters is None or value is None:
            return ""
        signature = inspect.signature(value)
    except LookupError:
        return "is gone"
    except (TypeError, ValueError):  # native code says nothing about itself
        return ""
    by_position, _, by_name = (words.split() for words in parameters.partition("*"))
    is_method = isinstance(owner, type) and inspect.isfunction(inspect.getattr_static(owner, name.rpartition(".")[2]))
    by_position = ["self"] * is_method + by_position
    try:
        signature.bind(*by_position, **dict.fromkeys(by_name))
    except TypeError as error:
        return f"takes other parameters ({error})"
    known = list(signature.parameters)
    return "takes other parameters" if strict and known[:len(by_position)] != by_position else ""


def _resolved(name: str) -> tuple:
    """(what a dotted name stands for, what holds it). (None, None) where that cannot be looked at: in a module that the host
    has not imported, an attribute that only objects have, a class that another pack put there. Raises LookupError."""
    module, attributes = _module_of(name)
    if module is None:
        return None, None
    value = owner = module
    for index, attribute in enumerate(attributes):
        owner = value
        try:
            value = getattr(owner, attribute)
        except AttributeError:
            sources = list(_sources_of(owner)) if isinstance(owner, type) else [""]
            if all(any(_sets(source, word) for source in sources) for word in attributes[index:]) or not sources:
                return None, None
            raise LookupError(name) from None
    return value, owner


def _module_of(name: str) -> tuple:
    """The longest part of a dotted name that is an imported module, and the rest of it. (None, ...) for one not imported."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = sys.modules.get(".".join(parts[:end]))
        if module is not None:
            break
    else:
        end, module = 0, None
    rest = parts[end:]
    path = getattr(module, "__path__", None) if module else None
    if rest and (module is None or path is not None) and not (module and hasattr(module, rest[0])):
        if importlib.machinery.PathFinder.find_spec(".".join(parts[:end + 1]), path) is not None:
            return None, rest
        if module is None:
            raise LookupError(name)
    return module, rest


def _sets(source: str, word: str) -> bool:
    """Whether a source has an attribute of that name, of an object or of a class."""
    return any(re.search(pattern, source) for pattern in (rf"\.{word}\b", rf"\n    {word}\b", rf"def {word}\b"))


def _sources_of(cls: type) -> Iterator[str]:
    """The source of the modules that define a class and those it derives from."""
    for name in dict.fromkeys(base.__module__ for base in cls.__mro__):
        if name.split(".")[0] in HOST_MODULES and (source := _source(name)):
            yield source


@functools.cache
def _source(module: str) -> str:
    """The text of a module that is imported, or ""."""
    try:
        return Path(sys.modules[module].__file__).read_text(encoding="utf-8")
    except (KeyError, AttributeError, TypeError, OSError, UnicodeError):
        return ""


# --- who needs it ---

def used_names(path: Path) -> dict[str, list[ast.Call]]:
    """Dotted names of the host that a source file of this pack uses -> their calls."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aliases, found = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in HOST_MODULES:
                    whole = alias.name if alias.asname else alias.name.split(".")[0]
                    aliases[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in HOST_MODULES:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.setdefault(f"{node.module}.{alias.name}", [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func, aliases)
            if name:
                found.setdefault(name, []).append(node)
        elif isinstance(node, ast.Attribute):
            name = _dotted(node, aliases)
            if name:
                found.setdefault(name, [])
    return {name: calls for name, calls in found.items() if calls or not any(other.startswith(f"{name}.") for other in found)}


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    attributes = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(attributes)])


def files_behind(path: Path) -> set[Path]:
    """The source files of this pack that are imported when one of them is, itself among them."""
    found, waiting = set(), [path]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        waiting += _imported(path)
    return found


@functools.cache  # the same few files are behind all nodes
def _imported(path: Path) -> list[Path]:
    """Where the modules may lie that a source file of this pack imports, and the packages that it is in."""
    found = [parent / "__init__.py" for parent in path.parents if parent != ROOT and ROOT in parent.parents]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            modules = [base, *(base / alias.name for alias in node.names)]
            found += [file for module in modules for file in (module.with_suffix(".py"), module / "__init__.py")]
    if path == ROOT / "nodes" / "__init__.py":  # which imports each file of nodes by itself: none is behind another
        found = [file for file in found if file not in node_files()]
    return found


@functools.cache
def needs(path: Path) -> set[str]:
    """The names of the list that a source file of this pack uses, as `changes` calls them."""
    where = path.relative_to(ROOT).as_posix()
    marks = {f"{module}: {word}" for module, words in MARKS.get(where, {}).items() for word in words.split()}
    return used_names(path).keys() | MEMBERS.get(where, {}).keys() | marks


def node_files() -> list[Path]:
    """The files of this pack that define nodes."""
    return [path for path in sorted((ROOT / "nodes").glob("*.py")) if titles(path)]


def left_out(changed: dict[str, str]) -> dict[str, set[str]]:
    """File of nodes, without its suffix -> the changed names without which its nodes cannot be there."""
    hard = changed.keys() - WITHOUT.keys()
    if not hard:
        return {}
    found = {}
    for path in node_files():
        missing = hard & set().union(*map(needs, files_behind(path)))
        if missing:
            found[path.stem] = missing
    return found


@functools.cache
def titles(path: Path) -> list[str]:
    """What the nodes in a file are called."""
    return [keyword.value.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Schema"
            for keyword in node.keywords if keyword.arg == "display_name"]


def sentences(changed: dict[str, str], host_version: str) -> Iterator[str]:
    """What is to be said about the changes: one sentence about all nodes that go, one about each other thing."""
    start = f"ComfyUI {host_version} has not all that this version of Featherweight relies on:"
    out = left_out(changed)
    if out:
        nodes = [title for path in node_files() if path.stem in out for title in titles(path)]
        yield (f"{start} {_listed(changed, set().union(*out.values()))}. So {len(nodes)} nodes are left out:"
               f" {', '.join(nodes)}. Update Featherweight.")
    for consequence in dict.fromkeys(WITHOUT[name] for name in changed if name in WITHOUT):
        names = {name for name in changed if WITHOUT.get(name) == consequence}
        yield f"{start} {_listed(changed, names)}. So {consequence}. Update Featherweight."


def _listed(changed: dict[str, str], names: set[str]) -> str:
    shown = [f"{name} {changed[name]}" for name in sorted(names)]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
