// The texts that this pack's nodes show on themselves stay after a run, which newer editors end by taking every text away. They go
// where they are not true any more: from a node that was cancelled, failed or refused its inputs.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const CATEGORY = "Featherweight";
const WIDGET = "$$node-text-preview"; // the editor's name for it

const texts = new WeakMap(); // node -> its text

const textWidget = (node) => node.widgets?.find((widget) => widget.name === WIDGET);

/** This pack's nodes on the canvas: of the workflow, or of the subgraph that is open. */
const ownNodes = () => (app.canvas?.graph?.nodes ?? []).filter((node) => node.constructor.nodeData?.category?.startsWith(CATEGORY));

function remember() {
  for (const node of ownNodes()) {
    const widget = textWidget(node);
    if (widget) texts.set(node, widget.value);
  }
}

function showAgain() {
  for (const node of ownNodes()) {
    if (texts.has(node) && !textWidget(node)) api.dispatchCustomEvent("progress_text", { nodeId: String(node.id), text: texts.get(node) });
  }
}

/** Takes the text off the node that the server calls 3, or 12:3 if it is in the subgraph of node 12. */
function remove(executionId, type) {
  let node;
  for (const id of String(executionId).split(":")) node = (node ? node.subgraph : app.rootGraph ?? app.graph)?.getNodeById(id);
  if (!node || node.type !== type) return; // of a workflow in another tab
  texts.delete(node);
  const widget = textWidget(node);
  if (widget) node.removeWidget(widget);
  node.setDirtyCanvas(true, true);
}

/** Calls a function once the editor has handled an event too, which may be after this extension or before it. */
const on = (event, callback) => api.addEventListener(event, ({ detail }) => queueMicrotask(() => callback(detail)));

on("progress_text", remember);
on("execution_success", showAgain);
for (const event of ["execution_error", "execution_interrupted"]) {
  on(event, (detail) => {
    remove(detail.node_id, detail.node_type);
    showAgain();
  });
}

const queuePrompt = api.queuePrompt;
api.queuePrompt = async function (...given) {
  try {
    return await queuePrompt.apply(this, given);
  } catch (error) {
    for (const [id, { class_type }] of Object.entries(error.response?.node_errors ?? {})) remove(id, class_type);
    throw error;
  }
};
