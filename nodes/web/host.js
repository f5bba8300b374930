// What a panel of ours needs of the node and the canvas that it lives in.

import { app } from "../../scripts/app.js";

export const MARGIN = 10; // default margin of a widget, in pixels
export const LOOK = 500; // milliseconds between checks that the element is still on the page

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
export function passToCanvas(element, scrolls = false) {
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

/** Insert the element: Vue nodes of frontend 1.28.8, unlike those of 1.34.9, do not show the widgets of extensions. */
export function place(node, element) {
  if (!window.LiteGraph?.vueNodesMode || element.isConnected || node.graph !== app.canvas?.graph) return;
  document.querySelector(`[data-testid="node-body-${CSS.escape(String(node.id))}"]`)?.append(element);
}
