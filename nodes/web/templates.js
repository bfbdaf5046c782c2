// This pack's templates in their order: the one to start with, then the others by name. The server lists them as they lie in
// their folder.
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2)); // /extensions/PACK/templates.js
const listed = api.getWorkflowTemplates;
const isFirst = (name) => name.startsWith("Start here");

if (listed) {
  api.getWorkflowTemplates = async function (...given) {
    const templates = await listed.apply(this, given);
    templates?.[PACK]?.sort((one, other) => isFirst(other) - isFirst(one) || (one < other ? -1 : 1));
    return templates;
  };
}
