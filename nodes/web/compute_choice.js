// Workflows of versions up to 0.2.1 lack the hidden input "host formats". There "exact" meant what is "automatic" now: layers in
// ComfyUI's own formats are computed by ComfyUI's kernels where it has them.
import { app } from "../../scripts/app.js";

const INPUT = "host_formats";

app.registerExtension({
  name: "Featherweight.ComputeChoice",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Featherweight") || !nodeData.input?.optional?.[INPUT]) return;
    const configure = nodeType.prototype.onConfigure;
    nodeType.prototype.onConfigure = function (saved, ...rest) {
      const result = configure?.call(this, saved, ...rest);
      const index = this.widgets?.findIndex((widget) => widget.name === INPUT) ?? -1;
      if (Array.isArray(saved.widgets_values) && saved.widgets_values.length <= index) this.widgets[index].value = "automatic";
      return result;
    };
  },
});
