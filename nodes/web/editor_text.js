// A text for the editor as node_text.py makes it, for those that come from elsewhere: names, which may come from files, are no markup
// of the editor, which shows links and in one design Markdown. Nothing else is marked, so that what is copied can be found.

const JOINER = "\u2060"; // has no width; what stands beside it is no markup
const MARKUP = new RegExp([
  /^(?=[ \t]*(?:[-+#=|:]|\d+[.)])| {4}| {0,3}\t)/,
  /(?<![\p{L}\p{N}])(?=_)|(?<=_)(?![\p{L}\p{N}])/u,
  /(?<=\])(?=[(\[:])|(?<=[!\[])(?=\[)|(?<=:)(?=\/\/)|(?<=www)(?=\.)|(?<=@)/u,
  /(?<=\\)(?=[!-/:-@\[-_{-~])|(?<=&)(?=[#\p{L}\p{N}_])/u,
].map(({ source }) => source).join("|"), "gimu");
const LOOKALIKES = { "<": "‹", ">": "›", "*": "∗", "`": "‘", "~": "∼" };

export const editorText = (message) => message.trim().replace(/[<>*`~]/g, (mark) => LOOKALIKES[mark])
  .replace(MARKUP, JOINER).replaceAll("\n", "  \n");
