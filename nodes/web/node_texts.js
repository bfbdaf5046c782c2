// The texts that this pack shows on nodes stay after a run, which newer editors end by taking every text away. They go
// where they are not true any more: from a node that was cancelled, failed or refused its inputs. A node that failed says why:
// of newer editors the message itself is only in the details of the error.
// ComfyUI keeps a node's last text with its outputs (node_text.py): it comes with those of a node that need not run again, and a workflow
// that is opened gets the texts of its last runs from the history.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { editorText } from "./editor_text.js";

const CATEGORY = "Featherweight";
const WIDGET = "$$node-text-preview"; // the editor's name for it

const CLASS = "featherweight-text"; // of a text of this pack's, whose words are kept whole

const KEY = "featherweight_text"; // in a node's outputs; an event of this name says that the text of a node has changed since
const RUNS = 5; // of a workflow, that are looked through for its texts

const texts = new WeakMap(); // node -> its text
const failed = new Set(); // nodes that say why they failed
const workflows = new Map(); // the last prompts that were sent from here -> their workflows
const PROMPTS = 100;

// else the editor breaks lines within words
const style = document.createElement("style");
style.textContent = `.${CLASS} .break-all { word-break: normal; overflow-wrap: anywhere; }`;
document.head.append(style);

const textWidget = (node) => node.widgets?.find((widget) => widget.name === WIDGET);

/** The nodes on the canvas: of the workflow, or of the subgraph that is open. */
const nodes = () => app.canvas?.graph?.nodes ?? [];

const isOwn = (node) => node.constructor.nodeData?.category?.startsWith(CATEGORY);

function remember() {
  for (const node of nodes()) {
    const widget = textWidget(node);
    // on a LoRA loader of ComfyUI's, what this pack says of its LoRA
    if (!widget || !(isOwn(node) || String(widget.value).includes(`(${CATEGORY})`))) continue;
    texts.set(node, widget.value);
    widget.props = { ...widget.props, class: CLASS };
  }
}

function showAgain() {
  for (const node of nodes()) {
    if (texts.has(node) && !textWidget(node)) api.dispatchCustomEvent("progress_text", { nodeId: String(node.id), text: texts.get(node) });
  }
}

/** The node that the server calls 3, or 12:3 if it is in the subgraph of node 12. */
function find(executionId) {
  let node;
  for (const id of String(executionId).split(":")) node = (node ? node.subgraph : app.rootGraph ?? app.graph)?.getNodeById(id);
  return node;
}

function clear(node) {
  texts.delete(node);
  const widget = textWidget(node);
  if (widget) node.removeWidget(widget);
  node.setDirtyCanvas(true, true);
}

function remove(executionId, type) {
  const node = find(executionId);
  if (node?.type === type) clear(node); // else of a workflow in another tab
}

/** Shows a text on a node, or on none once its graph is opened; an empty one is none. */
function show(node, text) {
  if (!text) return clear(node);
  texts.set(node, editorText(text));
  if (nodes().includes(node)) api.dispatchCustomEvent("progress_text", { nodeId: String(node.id), text: texts.get(node) });
}

/** The text in the outputs of a node; undefined where none is kept. */
const textIn = (outputs) => outputs?.[KEY]?.at(-1)?.[0];

const read = async (path) => (await api.fetchApi(path)).json();

const workflowId = () => (app.rootGraph ?? app.graph).id;

/** Whether a prompt is of the open workflow, not of one in another tab of the editor. */
const isHere = ({ prompt_id: id }) => (workflows.get(id) ?? workflowId()) === workflowId();

/** What the history has of a run: [nodes of the open workflow that are as they were then, with their texts]; none of another workflow. */
async function textsOf(promptId) {
  const { prompt, outputs } = (await read(`/history/${promptId}`))[promptId] ?? {};
  if (!prompt || prompt[3]?.extra_pnginfo?.workflow?.id !== workflowId()) return [];
  return Object.entries(outputs).map(([id, output]) => [find(id), textIn(output), prompt[2][id]]).filter(
    ([node, text, { class_type: type, inputs } = {}]) => text !== undefined && node?.type === type
      && (node.widgets ?? []).every(({ name, value }) => !(name in inputs) || Array.isArray(inputs[name]) || inputs[name] === value));
}

async function showLastRuns() {
  const { jobs } = await read(`/jobs?workflow_id=${encodeURIComponent(workflowId())}&limit=${RUNS}`);
  const decided = new Set(); // nodes of which a later run has said something, or where it failed
  for (const { id, execution_error: error } of jobs ?? []) {
    for (const [node, text] of await textsOf(id)) {
      if (!decided.has(node) && !texts.has(node)) show(node, text);
      decided.add(node);
    }
    if (error) decided.add(find(error.node_id));
  }
}

function showFailure({ node_id: id, node_type: type, exception_message: message }) {
  const node = find(id);
  if (!message || node?.type !== type || !isOwn(node) || !nodes().includes(node)) return;
  failed.add(node);
  api.dispatchCustomEvent("progress_text", { nodeId: String(node.id), text: editorText(message) });
}

/** Calls a function once the editor has handled an event too, which may be after this extension or before it. */
const on = (event, callback) => api.addEventListener(event, ({ detail }) => queueMicrotask(() => callback(detail)));

on("progress_text", remember);
on("executed", (detail) => {
  const node = find(detail.display_node || detail.node), text = textIn(detail.output);
  if (node && text !== undefined && isHere(detail) && isOwn(node)) show(node, text);
});
on(KEY, async ({ prompt_id: promptId, node: id }) => {
  for (const [node, text] of await textsOf(promptId)) if (node === find(id)) show(node, text);
});
on("execution_success", showAgain);
on("executing", (id) => {
  const node = id ? find(id) : null;
  if (node && texts.has(node) && !isOwn(node)) remove(id, node.type); // which says nothing where all is well
});
on("execution_start", () => {
  failed.forEach(clear);
  failed.clear();
});
for (const event of ["execution_error", "execution_interrupted"]) {
  on(event, (detail) => {
    if (!isHere(detail)) return;
    remove(detail.node_id, detail.node_type);
    showAgain();
    if (event === "execution_error") showFailure(detail);
  });
}

const queuePrompt = api.queuePrompt;
api.queuePrompt = async function (...given) {
  try {
    const id = given[1]?.workflow?.id ?? workflowId(), sent = await queuePrompt.apply(this, given);
    workflows.set(sent?.prompt_id, id);
    if (workflows.size > PROMPTS) workflows.delete(workflows.keys().next().value);
    return sent;
  } catch (error) {
    for (const [id, { class_type }] of Object.entries(error.response?.node_errors ?? {})) remove(id, class_type);
    throw error;
  }
};

app.registerExtension({
  name: "Featherweight.NodeTexts",
  setup: () => app.canvas.canvas.addEventListener("litegraph:set-graph", showAgain), // a subgraph that is opened
  afterConfigureGraph: () => void showLastRuns().catch(() => {}), // of an editor without a server no text comes
});
