"""The host's hooks, which exchange the patches of a model between two parts of its conditioning."""
import comfy.hooks
import comfy.utils

from ..lora import LayerPatches
from .applying import ApplyingPatcher


class HooksPatcher(ApplyingPatcher):
    """The methods of the host's patchers that apply hooks."""

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        if self._packed_weight(key) is None:
            self._make_writable(key)
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        patches = self._all_patches.get(key, []) + combined_patches[key]
        patches = self._build(key, patches, self.load_device, {key: original_weights.pop(key)})
        self._hand_over_for_hooks(key, patches)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = patches

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        if isinstance(cached_weights[key], (LayerPatches, type(None))):
            self._hand_over_for_hooks(key, cached_weights[key])
        else:
            self._make_writable(key)
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def _make_writable(self, key: str):
        """Hooks of the host write into dense weights where they lie, which may be in a mapped file."""
        if not self.is_dynamic() and key not in self.hook_backup:
            self.unpin_weight(key)
            comfy.utils.set_attr_param(self.model, key, comfy.utils.get_attr(self.model, key).clone())

    def _hand_over_for_hooks(self, key: str, patches: LayerPatches | None):
        applied = self.model.packed_patches
        applied.before_hooks.setdefault(key, applied.layers.get(key))
        self._hand_to_layer(key, patches)

    def unpatch_hooks(self, whitelist_keys_set=None):
        before_hooks = self.model.packed_patches.before_hooks
        for key in list(before_hooks):
            if not whitelist_keys_set or key in whitelist_keys_set:
                self._hand_to_layer(key, before_hooks.pop(key))
        super().unpatch_hooks(whitelist_keys_set)
