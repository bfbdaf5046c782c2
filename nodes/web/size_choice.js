// The input "size in GB" of loaders is shown where "pack to" asks for a size.
import { app } from "../../scripts/app.js";

const CHOICE = "pack_to", ASKS = "size in GB", INPUT = "size_gb";

function update(node) {
  const [choice, size] = [CHOICE, INPUT].map((name) => node.widgets?.find((widget) => widget.name === name));
  if (!choice || !size) return;
  size.hidden = choice.value !== ASKS;
  size.options.hidden = size.hidden;
  if (!size.hidden) node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.graph?.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "Featherweight.SizeChoice",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const inputs = nodeData.input?.optional ?? {};
    if (!nodeData.name.startsWith("Featherweight") || !inputs[CHOICE] || !inputs[INPUT]) return;
    const { onNodeCreated, onConfigure } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...values) {
      const result = onNodeCreated?.apply(this, values);
      const choice = this.widgets?.find((widget) => widget.name === CHOICE);
      if (choice) {
        const { callback } = choice;
        choice.callback = (...chosen) => {
          callback?.apply(choice, chosen);
          update(this);
        };
      }
      update(this);
      return result;
    };
    nodeType.prototype.onConfigure = function (...values) {
      const result = onConfigure?.apply(this, values);
      update(this);
      return result;
    };
  },
});
