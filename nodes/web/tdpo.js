// The live view of TDPO-R Train: a widget of its own in the node, in both of ComfyUI's renderers.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { chooseRun, executionIds, nodesWithin } from "./model.js";
import { leastHeight, Panel } from "./panel.js";
import { runs } from "./runs.js";

const NODE = "TDPOTrain";
const WIDGET = "tdpo_live"; // a type of our own: the Vue renderer replaces those it knows
const REMEMBERED = "tdpo_run"; // property of the node: "id of the node|id of the run"; a copy has another id
const WIDTH = 600; // pixels of a new node
const MARGIN = 10; // pixels around a widget, where nothing else is said
const LOOK = 500; // milliseconds between two looks at whether the page still shows the element

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./tdpo.css", import.meta.url).href;
document.head.append(style);

api.addEventListener("tdpo.progress", () => {}); // of events that nobody ever waited for ComfyUI warns

const views = new WeakMap(); // by node

app.registerExtension({
  name: "comfy_tdpo.live",
  nodeCreated(node) {
    if (node.comfyClass === NODE) views.set(node, new LiveView(node));
  },
  afterConfigureGraph() {
    for (const node of nodesWithin(rootOf(app.graph))) views.get(node)?.begin();
  },
});

const rootOf = (graph) => graph?.rootGraph ?? graph;

/** Ties a panel to a node, from when the node is added to a graph until it is removed, or the subgraph around it is. */
class LiveView {
  #panel = new Panel();
  #end = null;

  constructor(node) {
    this.node = node;
    const { element } = this.#panel;
    const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
      serialize: false, // not part of the prompt
      hideOnZoom: false,
      getMinHeight: () => leastHeight(node.size[0] - 2 * MARGIN),
    });
    widget.serialize = false; // nor of the saved workflow
    keepSeed(node);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, WIDTH), height]);
    passToCanvas(element);
    after(node, "onAdded", () => this.begin());
    after(node, "onRemoved", () => this.#finish());
    after(node, "onConfigure", () => this.#update());
    after(node, "onExecuted", (output) => this.#remember(output?.tdpo_run?.[0]));
    if (node.graph) this.begin();
  }

  begin() {
    if (this.#end) return;
    this.#panel.attach();
    const unwatch = runs.watch(() => this.#update() || this.#finish());
    const placing = setInterval(() => place(this.node, this.#panel.element), LOOK);
    this.#end = () => {
      clearInterval(placing);
      unwatch();
      this.#panel.detach();
    };
  }

  #finish() {
    this.#end?.();
    this.#end = null;
  }

  /** Show what is known now; whether the node can be reached. */
  #update() {
    const ids = executionIds(this.node, rootOf(this.node.graph));
    const id = chooseRun(runs.list, ids, this.#remembered(), runName(this.node));
    if (id !== null) this.#remember(id);
    this.#panel.show(id);
    return ids.length > 0;
  }

  #remembered() {
    const [node, run] = String(this.node.properties?.[REMEMBERED] ?? "").split(/\|(.*)/s);
    return node === String(this.node.id) ? run : null;
  }

  #remember(run) {
    if (typeof run === "string") this.node.properties[REMEMBERED] = `${this.node.id}|${run}`;
  }
}

/** What the node's run is to be called; null where that comes along a wire. */
function runName(node) {
  const isRunName = ({ name }) => name === "run_name";
  if (node.inputs?.find(isRunName)?.link != null) return null;
  return node.widgets?.find(isRunName)?.value ?? null;
}

/** Another seed is another run: ComfyUI must not draw a new one after each, unless it is asked to. */
function keepSeed(node) {
  const control = node.widgets.find(({ name }) => name === "control_after_generate");
  if (control) control.value = "fixed";
}

function after(object, method, extra) {
  const original = object[method];
  object[method] = function (...args) {
    const result = original?.apply(this, args);
    extra(...args);
    return result;
  };
}

/** Zooming and panning go on over the panel, as they do over ComfyUI's own text fields. */
function passToCanvas(element) {
  const pass = (method, wanted) => (event) => {
    if (window.LiteGraph?.vueNodesMode || !wanted(event)) return; // there the page passes them on itself
    event.preventDefault();
    app.canvas[method](event);
  };
  element.addEventListener("wheel", pass("processMouseWheel", () => true), { passive: false });
  element.addEventListener("pointerdown", pass("processMouseDown", ({ button }) => button === 1));
  element.addEventListener("pointermove", pass("processMouseMove", ({ buttons }) => buttons & 4));
  element.addEventListener("pointerup", pass("processMouseUp", ({ button }) => button === 1));
}

/** The Vue nodes of frontend 1.28.8 show none of the widgets that extensions add, as those of 1.34.9 do: put it there. */
function place(node, element) {
  if (!window.LiteGraph?.vueNodesMode || element.isConnected || node.graph !== app.canvas?.graph) return;
  document.querySelector(`[data-testid="node-body-${CSS.escape(String(node.id))}"]`)?.append(element);
}
