// This pack's templates in the order of their names, the demo first: the server lists them as they lie in their folder.
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2)); // /extensions/PACK/templates.js
const listed = api.getWorkflowTemplates;

if (listed) {
  api.getWorkflowTemplates = async function (...given) {
    const templates = await listed.apply(this, given);
    templates?.[PACK]?.sort();
    return templates;
  };
}
