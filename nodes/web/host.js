// What a panel of ours needs of the node and the canvas that it lives in.

import { app } from "../../scripts/app.js";

const LOOK = 500; // milliseconds between checks that the element is still on the page

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./tdpo.css", import.meta.url).href;
document.head.append(style);

export const rootOf = (graph) => graph?.rootGraph ?? graph;

export function after(object, method, extra) {
  const original = object[method];
  object[method] = function (...args) {
    const result = original?.apply(this, args);
    extra(...args);
    return result;
  };
}

/**
 * Let zooming and panning work over the panel, as they do over ComfyUI's own text fields. If it `scrolls`, the wheel
 * scrolls it while it has more than it shows.
 */
function passToCanvas(element, scrolls = false) {
  const pass = (method, wanted) => (event) => {
    if (window.LiteGraph?.vueNodesMode || !wanted(event)) return; // the page then passes them on itself
    event.preventDefault();
    app.canvas[method](event);
  };
  element.addEventListener("wheel", pass("processMouseWheel", () => !scrolls || element.scrollHeight <= element.clientHeight), { passive: false });
  element.addEventListener("pointerdown", pass("processMouseDown", ({ button }) => button === 1));
  element.addEventListener("pointermove", pass("processMouseMove", ({ buttons }) => buttons & 4));
  element.addEventListener("pointerup", pass("processMouseUp", ({ button }) => button === 1));
}

/** Add the element to the node as a widget that is part of neither the prompt nor the saved workflow. */
export function addWidget(node, type, element, getMinHeight, scrolls = false) {
  node.addDOMWidget(type, type, element, { serialize: false, hideOnZoom: false, getMinHeight }).serialize = false;
  passToCanvas(element, scrolls);
}

/** The id of the run that `remember` noted in a property of the node; null if there is none, as in a copy. */
export function remembered(node, property) {
  const [id, run] = String(node.properties?.[property] ?? "").split(/\|(.*)/s);
  return id === String(node.id) ? run : null;
}

/** Note a run in a property of the node: "id of the node|id of the run", as a copy has another id. */
export function remember(node, property, run) {
  node.properties[property] = `${node.id}|${run}`;
}

/** Keeps the element in the node, see `place`, from `begin` to `end`. */
export class Placing {
  #timer = null;

  constructor(node, element) {
    this.node = node;
    this.element = element;
  }

  begin() {
    this.#timer ??= setInterval(() => place(this.node, this.element), LOOK);
  }

  end() {
    clearInterval(this.#timer);
    this.#timer = null;
  }
}

/** Insert the element: Vue nodes of frontend 1.28.8, unlike those of 1.34.9, do not show the widgets of extensions. */
function place(node, element) {
  if (!window.LiteGraph?.vueNodesMode || element.isConnected || node.graph !== app.canvas?.graph) return;
  document.querySelector(`[data-testid="node-body-${CSS.escape(String(node.id))}"]`)?.append(element);
}
