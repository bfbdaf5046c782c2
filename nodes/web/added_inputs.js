// Saved workflows of earlier versions lack inputs that were added since, and the editor would give them today's defaults. The server
// says in the description of such an input what it means in them: with "host_formats" (since 0.2.2), "exact" meant what is
// "automatic" now. Or it says which input this one replaced, whose connection it takes then.
import { app } from "../../scripts/app.js";

const replacedInputs = {}; // type of a node -> [name of an input of earlier versions, name of the one that replaced it] of each

/** Gives the connection of a saved input to the one that replaced it. */
function moveConnection(saved, [from, to]) {
  const input = saved.inputs?.find(({ name }) => name === from);
  if (!input) return;
  const dropped = input.link == null ? from : to;
  saved.inputs = saved.inputs.filter(({ name }) => name !== dropped);
  input.name = to;
}

app.registerExtension({
  name: "Featherweight.AddedInputs",
  // Before the editor gives links to slots: some editors go by the names of the saved inputs, later ones by the saved places.
  beforeConfigureGraph(saved) {
    for (const { nodes } of [saved, ...(saved.definitions?.subgraphs ?? [])])
      for (const node of nodes ?? []) for (const names of replacedInputs[node.type] ?? []) moveConnection(node, names);
  },
  beforeRegisterNodeDef({ prototype }, nodeData) {
    if (!nodeData.name.startsWith("Featherweight")) return;
    for (const [name, [, options]] of Object.entries(nodeData.input?.optional ?? {})) {
      const { value_in_earlier_workflows: earlier, replaced_input: replaced } = options ?? {};
      if (replaced !== undefined) (replacedInputs[nodeData.name] ??= []).push([replaced, name]);
      if (earlier !== undefined) {
        const { onConfigure } = prototype;
        prototype.onConfigure = function (saved, ...rest) {
          const result = onConfigure?.call(this, saved, ...rest);
          const index = this.widgets?.findIndex((widget) => widget.name === name) ?? -1;
          if (index >= 0 && saved.widgets_values?.length <= index) this.widgets[index].value = earlier;
          return result;
        };
      }
    }
  },
});
