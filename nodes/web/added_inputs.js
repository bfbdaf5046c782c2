// Saved workflows of earlier versions lack inputs that were added since, and the editor would give them today's defaults. The server
// says in the description of such an input what it means in them: with "host_formats" (since 0.2.2), "exact" meant what is
// "automatic" now.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "Featherweight.AddedInputs",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Featherweight")) return;
    const earlier = new Map();
    for (const [name, [, options]] of Object.entries(nodeData.input?.optional ?? {}))
      if (options?.value_in_earlier_workflows !== undefined) earlier.set(name, options.value_in_earlier_workflows);
    if (!earlier.size) return;
    const configure = nodeType.prototype.onConfigure;
    nodeType.prototype.onConfigure = function (saved, ...rest) {
      const result = configure?.call(this, saved, ...rest);
      if (Array.isArray(saved.widgets_values))
        for (const [index, widget] of (this.widgets ?? []).entries())
          if (earlier.has(widget.name) && saved.widgets_values.length <= index) widget.value = earlier.get(widget.name);
      return result;
    };
  },
});
