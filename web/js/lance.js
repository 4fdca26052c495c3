// Under Load Lance: what the chosen checkpoint lacks, what memory it needs, and what this machine has.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NODE = "LoadLance";
const GIB = 2 ** 30;
const STYLE = `
  .lance-status { box-sizing: border-box; color: var(--input-text); font-size: 11px; line-height: 1.4; }
  .lance-status > div { padding: 4px 10px; }
  .lance-status p { margin: 0 0 4px; overflow-wrap: anywhere; user-select: text; }
  .lance-status p.memory { color: var(--descrip-text); }
  .lance-status p.problem { color: var(--error-text); }
  .lance-status code { font-family: monospace; user-select: all; }
  .lance-status a { color: inherit; text-decoration: underline; }
`;

const language = () => app.extensionManager.setting.get("Comfy.Locale") ?? "en";

async function loadTexts() {
  const languages = await (await api.fetchApi("/i18n")).json();
  return () => ({ ...languages.en.lance, ...languages[language()]?.lance });
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const link = (text, href) => element("a", { href, target: "_blank", rel: "noopener" }, text);

/** The parts of a text such as "Put {file} into {folder}", with values or elements in the place of the names. */
const filled = (text, values) => text.split(/\{(\w+)\}/).map((part, i) => (i % 2 ? values[part] : part));

const problem = (...children) => element("p", { className: "problem" }, ...children);

const gigabytes = (bytes) => (bytes / GIB).toFixed(bytes < GIB / 4 ? 3 : 1);

function memoryLine(texts, { needs, machine }) {
  const parts = [];
  if (needs) {
    const { dtype, ...bytes } = needs;
    const all = Object.values(bytes).reduce((sum, part) => sum + part);
    const sizes = Object.fromEntries(Object.entries({ ...bytes, all }).map(([part, size]) => [part, gigabytes(size)]));
    parts.push(filled(texts.needs, { dtype, ...sizes }));
  }
  const had = (text, [total, free]) => filled(text, { total: gigabytes(total), free: gigabytes(free) });
  parts.push(machine.vram ? had(texts.vram, machine.vram) : [texts.cpu], had(texts.ram, machine.ram));
  return element("p", { className: "memory" }, parts.map((part) => part.join("")).join(" "));
}

function lines(texts, status, name) {
  const release = link(texts.releaseLink, status.release);
  const lines = status.missing.map(({ file, folder, url }) =>
    problem(...filled(texts.missing, { file, folder }), " ", link(texts.fileLink, url)),
  );
  if (!status.offered) {
    const text = status.empty ? texts.empty : texts.unknown;
    const general = problem(...filled(text, { name, release, folder: status.folder }));
    if (status.empty || !lines.length) lines.unshift(general);
    lines.push(problem(element("code", {}, status.command)));
  }
  lines.push(...status.problems.map((sentence) => problem(sentence)));
  lines.push(memoryLine(texts, status));
  return lines;
}

/** Calls `after` whenever the node calls its method of that name. */
function afterwards(owner, name, after) {
  const before = owner[name];
  owner[name] = function (...values) {
    const result = before?.apply(this, values);
    after();
    return result;
  };
}

/** Adds the lines to a node; they are asked for again whenever `refreshes` or one of the node's values changes. */
function addStatus(node, texts, refreshes) {
  const content = element("div");
  const outside = element("div", { className: "lance-status" }, element("style", { textContent: STYLE }), content);
  let height = 40;
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => height, getMaxHeight: () => height };
  // A widget that is saved would shift the values of those behind it in workflows without it.
  node.addDOMWidget("lance_status", "lance_status", outside, options).serialize = false;

  const observer = new ResizeObserver(() => {
    if (!content.offsetHeight || content.offsetHeight === height) return;
    height = content.offsetHeight;
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    node.setDirtyCanvas(true, true);
  });
  observer.observe(content);

  const value = (name) => node.widgets.find((widget) => widget.name === name)?.value ?? "";
  let newest = 0;
  const refresh = async () => {
    const request = ++newest;
    const query = { name: value("checkpoint"), weight_dtype: value("weight_dtype") };
    let shown;
    try {
      const reply = await api.fetchApi(`/lance/checkpoint?${new URLSearchParams(query)}`);
      if (!reply.ok) throw new Error(reply.statusText);
      shown = lines((await texts)(), await reply.json(), query.name);
    } catch {
      shown = [problem((await texts)().unreachable)];
    }
    if (request === newest) content.replaceChildren(...shown);
  };

  for (const widget of node.widgets) afterwards(widget, "callback", refresh);
  afterwards(node, "onConfigure", refresh);
  afterwards(node, "onRemoved", () => {
    observer.disconnect();
    refreshes.delete(refresh);
  });
  refreshes.add(refresh);
  refresh();
}

const texts = loadTexts();
const refreshes = new Set();
const refreshAll = () => refreshes.forEach((refresh) => refresh());

app.registerExtension({
  name: "lance.status",
  setup() {
    app.ui.settings.addEventListener("Comfy.Locale.change", refreshAll);
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) addStatus(node, texts, refreshes);
  },
  refreshComboInNodes: refreshAll,
});
