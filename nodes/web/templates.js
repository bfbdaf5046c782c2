// This pack's templates in their order: the one to start with, the others by name, and those whose models only the
// repository has. The server lists them as they lie in their folder.
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2)); // /extensions/PACK/templates.js
const listed = api.getWorkflowTemplates;
const rank = (name) => (name.startsWith("Start here") ? 0 : name.startsWith("Repository demo") ? 2 : 1);

if (listed) {
  api.getWorkflowTemplates = async function (...given) {
    const templates = await listed.apply(this, given);
    templates?.[PACK]?.sort((one, other) => rank(one) - rank(other) || (one < other ? -1 : 1));
    return templates;
  };
}
