// Values of saved workflows that have other words here: names of model files from another system, and options of earlier versions.
// An input without options says what to do. Where a workflow writes flux\model.gguf and this system lists flux/model.gguf, or the reverse, this pack's loaders take the listed
// name. The server understands either; the editor would call a file missing, and show a word that its list has not.
import { app } from "../../scripts/app.js";

const CATEGORY = "Featherweight", NO_FILE = "add a file to models/"; // the second is shown where no file was there yet

/** The node and widget of this pack that hold a value: the given ones, or those that a subgraph shows through them. */
function own(node, widget) {
  if (!node.subgraph) return node.constructor.nodeData?.category?.startsWith(CATEGORY) ? { node, widget } : undefined;
  const slot = node.subgraph.inputs.find((input) => input.name === widget.name);
  for (const link of slot?.getLinks() ?? []) {
    const { inputNode, input } = link.resolve(node.subgraph);
    const shown = inputNode?.widgets?.find((candidate) => candidate.name === input.widget?.name);
    const found = shown && own(inputNode, shown);
    if (found) return found;
  }
}

const withSlashes = (name) => (typeof name === "string" ? name.replaceAll("\\", "/") : name);

/** What the server says of an input of a node: its type and settings. */
function described(nodeData, name) {
  const { required, optional } = nodeData?.input ?? {};
  return required?.[name] ?? optional?.[name] ?? [];
}

/** The words of earlier versions for options of an input -> today's; the server says them in the description of the node. */
const renamedOptions = ({ node, widget }) => described(node.constructor.nodeData, widget.name)[1]?.renamed_options ?? {};

function takeTodaysValues(node, definitions = {}) {
  for (const widget of node.widgets ?? []) {
    const [type, settings] = described(definitions[node.type], widget.name);
    if (type === "COMBO,STRING") widget.options.values = settings.options; // the editor does this for COMBO alone
    const found = own(node, widget);
    const values = found?.widget.options?.values, listed = Array.isArray(values) ? values : [];
    if (!found || listed.includes(widget.value)) continue;
    widget.value ??= described(found.node.constructor.nodeData, found.widget.name)[1]?.without_options;
    const renamed = renamedOptions(found);
    const today = Object.hasOwn(renamed, widget.value)
      ? renamed[widget.value]
      : widget.value?.startsWith?.(NO_FILE) ? listed[0] : listed.find((name) => withSlashes(name) === withSlashes(widget.value));
    if (today !== undefined) widget.value = today;
  }
}

function takeTodaysValuesIn(graph, definitions) {
  for (const node of graph.nodes) {
    takeTodaysValues(node, definitions);
    if (node.subgraph) takeTodaysValuesIn(node.subgraph, definitions);
  }
}

app.registerExtension({
  name: "Featherweight.SavedValues",
  // A node gets its values right after it is created, and only then the editor looks for missing models.
  nodeCreated: (node) => queueMicrotask(() => takeTodaysValues(node)),
  refreshComboInNodes: (definitions) => takeTodaysValuesIn(app.rootGraph ?? app.graph, definitions), // a missing file may be there now
});
