// The input "size in GB" is grey where the choice before it asks for no size. On loaders it is among the advanced inputs then.
import { app } from "../../scripts/app.js";

const INPUT = "size_gb", CHOICES = ["pack_to", "type"], ASKS = /^(mix for a size|size in GB)/; // the second in earlier versions

function parts(node) {
  const named = (name) => node.widgets?.find((widget) => widget.name === name);
  return { size: named(INPUT), choice: CHOICES.map(named).find(Boolean) };
}

/** Whether a widget gets its value by a link, as from a subgraph that shows it: then only the run knows the value. */
const isLinked = (node, widget) => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);

function update(node, isAdvanced) {
  const { size, choice } = parts(node);
  if (!size || !choice) return;
  const isUsed = ASKS.test(choice.value) || isLinked(node, choice) || isLinked(node, size);
  size.options ??= {};
  size.disabled = size.options.disabled = !isUsed;
  if (isAdvanced) size.options.advanced = !isUsed; // as editors of the modern design read it; the classic one shows all inputs
  if (isUsed) node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.graph?.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "Featherweight.SizeChoice",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const input = nodeData.input?.required?.[INPUT] ?? nodeData.input?.optional?.[INPUT];
    if (!nodeData.name.startsWith("Featherweight") || !input) return;
    const isAdvanced = !!input[1]?.advanced;
    const { onNodeCreated } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...values) {
      const result = onNodeCreated?.apply(this, values);
      const { choice } = parts(this);
      if (choice) {
        const { callback } = choice;
        choice.callback = (...chosen) => {
          callback?.apply(choice, chosen);
          update(this, isAdvanced);
        };
      }
      update(this, isAdvanced);
      return result;
    };
    for (const event of ["onConfigure", "onConnectionsChange"]) {
      const before = nodeType.prototype[event];
      nodeType.prototype[event] = function (...values) {
        const result = before?.apply(this, values);
        update(this, isAdvanced);
        return result;
      };
    }
  },
});
