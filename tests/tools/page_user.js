// Opens a report as a browser does that draws nothing, and uses its first panel.
"use strict";
const fs = require("fs");

const WIDTH = 676; // 600 between the edges
const canvases = [];

class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], style: {}, hidden: false, listeners: {} });
    Object.assign(this, { clientWidth: WIDTH, clientHeight: 272, texts: [] });
    if (tag === "canvas") canvases.push(this);
  }
  getContext() {
    this.texts = [];
    const pen = { fillText: (text, x, y) => this.texts.push({ text, y }) };
    return new Proxy(pen, { get: (_, name) => pen[name] ?? (() => {}) , set: () => true });
  }
  appendChild(child) { this.children.push(child); return child; }
  replaceChildren() { this.children = []; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  setPointerCapture() {}
}

const html = fs.readFileSync(process.argv[2], "utf8");
const [, curves] = html.match(/id="curves">(.*?)<\/script>/s);
const [, script] = html.match(/<script>(.*?)<\/script>/s);
const elements = { curves: { textContent: curves } };
for (const id of ["panels", "hint", "picture"]) {
  elements[id] = new Element(id);
  elements[id].hidden = id !== "picture";
}
const page = new Element("document");
page.getElementById = (id) => elements[id];
page.createElement = (tag) => new Element(tag);
new Function("document", "window", script)(page, new Element("window"));

const [canvas] = canvases;
const at = (share) => ({ offsetX: 52 + 600 * share, pointerId: 1 });
const steps = () => {
  const lowest = Math.max(...canvas.texts.map(({ y }) => y));
  return canvas.texts.filter(({ y }) => y === lowest).map(({ text }) => text);
};
const closer = () => {
  canvas.listeners.pointerdown(at(0.25));
  canvas.listeners.pointermove(at(0.75));
  canvas.listeners.pointerup(at(0.75));
  return steps();
};

const seen = { "picture hidden": elements.picture.hidden, "steps at first": steps() };
canvas.listeners.pointermove(at(0.5));
seen.words = elements.panels.children[0].children[2].children.map((word) => word.textContent);
seen["steps closer"] = closer();
page.listeners.keydown({ key: "Escape" });
seen["steps after Escape"] = steps();
closer();
canvas.listeners.dblclick();
seen["steps after a double click"] = steps();
console.log(JSON.stringify(seen));
