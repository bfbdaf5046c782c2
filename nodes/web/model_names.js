// Names of model files from another system: where a workflow writes flux\model.gguf and this system lists flux/model.gguf, or
// the reverse, this pack's loaders take the listed name. The server finds the file under either; the editor would call it missing.
import { app } from "../../scripts/app.js";

const CATEGORY = "Featherweight";

/** The widget of one of this pack's nodes that holds a value: the widget itself, or the one that a subgraph shows through it. */
function ownWidget(node, widget) {
  if (!node.subgraph) return node.constructor.nodeData?.category?.startsWith(CATEGORY) ? widget : undefined;
  const slot = node.subgraph.inputs.find((input) => input.name === widget.name);
  for (const link of slot?.getLinks() ?? []) {
    const { inputNode, input } = link.resolve(node.subgraph);
    const shown = inputNode?.widgets?.find((candidate) => candidate.name === input.widget?.name);
    const own = shown && ownWidget(inputNode, shown);
    if (own) return own;
  }
}

const withSlashes = (name) => (typeof name === "string" ? name.replaceAll("\\", "/") : name);

function takeListedNames(node) {
  for (const widget of node.widgets ?? []) {
    const names = ownWidget(node, widget)?.options?.values;
    if (!Array.isArray(names) || names.includes(widget.value)) continue;
    const listed = names.find((name) => withSlashes(name) === withSlashes(widget.value));
    if (listed !== undefined) widget.value = listed;
  }
}

function takeListedNamesIn(graph) {
  for (const node of graph.nodes) {
    takeListedNames(node);
    if (node.subgraph) takeListedNamesIn(node.subgraph);
  }
}

app.registerExtension({
  name: "Featherweight.ModelNames",
  // A node gets its values right after it is created, and only then the editor looks for missing models.
  nodeCreated: (node) => queueMicrotask(() => takeListedNames(node)),
  refreshComboInNodes: () => takeListedNamesIn(app.rootGraph ?? app.graph), // a missing file may be there now
});
