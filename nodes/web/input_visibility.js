// Which inputs a node shows. Advanced ones only where they are asked for, in the classic design too, by "Show Advanced" in the node's menu;
// "size in GB" only where the choice before it asks for a size. One that has a link is shown.
import { app } from "../../scripts/app.js";

const SIZE = "size_gb", CHOICES = ["pack_to", "type"], ASKS = /^(mix for a size|size in GB)/; // the second in earlier versions
const ALL_SHOWN = "Comfy.Node.AlwaysShowAdvancedWidgets"; // the editor's setting, which it has for the modern design alone

const named = (node, name) => node.widgets?.find((widget) => widget.name === name);
const choiceOf = (node) => CHOICES.map((name) => named(node, name)).find(Boolean);

/** Whether a widget gets its value by a link, as from a subgraph that shows it: then only the run knows the value. */
const isLinked = (node, widget) => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);

function update(node) {
  const areShown = app.extensionManager?.setting?.get(ALL_SHOWN);
  for (const widget of node.widgets ?? [])
    if (widget.options?.advanced) widget.advanced = !areShown && !isLinked(node, widget); // which the classic design reads
  const size = named(node, SIZE), choice = choiceOf(node);
  if (size && choice) {
    size.options ??= {};
    size.hidden = size.options.hidden = !(ASKS.test(choice.value) || isLinked(node, choice) || isLinked(node, size));
  }
}

/** Changes a node and its height by what its inputs then take more, or less. */
function fit(node, change) {
  const more = node.size[1] - node.computeSize()[1], result = change();
  node.setSize([node.size[0], more + node.computeSize()[1]]);
  node.graph?.setDirtyCanvas(true, true);
  return result;
}

app.registerExtension({
  name: "Featherweight.InputVisibility",
  beforeRegisterNodeDef({ prototype }, nodeData) {
    if (!nodeData.name.startsWith("Featherweight")) return;
    const { onNodeCreated, onConfigure, onConnectionsChange, toggleAdvanced, getLayoutWidgets } = prototype;
    prototype.onNodeCreated = function (...values) {
      const result = onNodeCreated?.apply(this, values), choice = choiceOf(this);
      if (choice && named(this, SIZE)) {
        const { callback } = choice;
        choice.callback = (...chosen) => {
          callback?.apply(choice, chosen);
          fit(this, () => update(this));
        };
      }
      fit(this, () => update(this));
      return result;
    };
    prototype.onConfigure = function (...values) {
      const result = onConfigure?.apply(this, values);
      update(this); // the saved height is that of the saved inputs
      return result;
    };
    prototype.onConnectionsChange = function (...values) {
      const result = onConnectionsChange?.apply(this, values);
      fit(this, () => update(this));
      return result;
    };
    // else the classic design leaves room for advanced inputs that it does not show, and goes on doing so
    if (toggleAdvanced) prototype.toggleAdvanced = function () {
      return fit(this, () => toggleAdvanced.call(this));
    };
    if (getLayoutWidgets) prototype.getLayoutWidgets = function () {
      return getLayoutWidgets.call(this).filter((widget) => !widget.advanced || this.showAdvanced);
    };
  },
});
