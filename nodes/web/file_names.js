// %date:yyyy-MM-dd% and %KSampler.seed% in the names of files, which the editor replaces in a fixed list of ComfyUI's own nodes. What is
// left, and all of it in a prompt that no editor queued, the server fills in.
import { app } from "../../scripts/app.js";

const INPUTS = { FeatherweightSavePackedModel: "filename_prefix", FeatherweightMeasureSensitivity: "name" };

app.registerExtension({
  name: "Featherweight.FileNames",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const input = INPUTS[nodeData.name];
    if (!input) return;
    const { onNodeCreated } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...values) {
      const result = onNodeCreated?.apply(this, values);
      const widget = this.widgets?.find(({ name }) => name === input);
      const replace = window.comfyAPI?.utils?.applyTextReplacements;
      if (widget && replace)
        widget.serializeValue = () => {
          for (const graph of [app.graph, app]) // earlier editors take the app
            try {
              return replace(graph, widget.value);
            } catch {}
          return widget.value;
        };
      return result;
    };
  },
});
