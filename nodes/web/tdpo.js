// The live view of TDPO-R Train and the ballot of TDPO Taste: custom widgets in the nodes, in both of ComfyUI's renderers.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { applyNodes, takeOver } from "./apply.js";
import { Ballot, leastHeight as leastBallot } from "./ballot.js";
import { addWidget, after, Placing, remember, remembered, rootOf } from "./host.js";
import { chooseRun, executionIds, nodesWithin, unused } from "./model.js";
import { LEAST_HEIGHT, Panel } from "./panel.js";
import { ballotOf, runs } from "./runs.js";
import { Table } from "./table.js";

const TRAIN = "TDPOTrain";
const TASTE = "TDPOTaste";
const WIDGET = "tdpo_live"; // our own type: the Vue renderer replaces the types it knows
const REMEMBERED = "tdpo_run"; // property of the node: its run
const VOTED_ON = "tdpo_taste"; // property of the node: the taste that it showed last
const RUNS = "comfy_tdpo.runs"; // the command that opens the table of runs
const WIDTH = 600; // pixels of a new node

api.addEventListener("tdpo.progress", () => {}); // ComfyUI warns about events without a listener

const views = new WeakMap(); // by node
let usedBy = null; // which algorithms use what, as the definition of TDPO-R Train says

app.registerExtension({
  name: "comfy_tdpo.live",
  commands: [{ id: RUNS, label: "TDPO: All runs", icon: "pi pi-chart-line", function: () => new Table().open() }],
  menuCommands: [{ path: ["TDPO"], commands: [RUNS] }],
  beforeRegisterNodeDef(_type, { name, input }) {
    if (name === TRAIN) usedBy = input.required.algorithm[1].used_by;
  },
  nodeCreated(node) {
    if (node.comfyClass === TRAIN) views.set(node, new LiveView(node));
    if (node.comfyClass === TASTE) views.set(node, new BallotView(node));
  },
  afterConfigureGraph() {
    for (const node of nodesWithin(rootOf(app.graph))) views.get(node)?.begin();
  },
});

/** Shows a panel in a node from when the node is added to a graph until it, or the subgraph around it, is removed. */
class LiveView {
  #panel = new Panel(
    (what) => takeOver(applyNodes(this.node, nodesWithin(rootOf(this.node.graph))), what),
    canFold() && ((folded) => refold(this.node, folded)),
  );
  #end = null;

  constructor(node) {
    this.node = node;
    const { element } = this.#panel;
    this.placing = new Placing(node, element);
    addWidget(node, WIDGET, element, () => LEAST_HEIGHT, true);
    keepSeed(node);
    if (canFold()) fold(node, true);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, WIDTH), height]);
    after(node, "onAdded", () => this.begin());
    after(node, "onRemoved", () => this.#finish());
    after(node, "onConfigure", () => this.#update());
    after(node, "onConnectionsChange", () => this.#sayUnused());
    after(widgetOf(node, "run_name"), "callback", () => this.#update());
    for (const name of ["algorithm", "settings"]) after(widgetOf(node, name), "callback", () => this.#sayUnused());
    after(node, "onExecuted", (output) => {
      const run = output?.tdpo_run?.[0];
      if (typeof run === "string") remember(node, REMEMBERED, run);
    });
    if (node.graph) this.begin();
  }

  begin() {
    if (this.#end) return;
    this.#panel.attach();
    const unwatch = runs.watch(() => this.#update() || this.#finish());
    const events = { execution_error: ({ detail }) => this.#failed(detail), execution_start: () => this.#panel.fail("") };
    for (const [type, heard] of Object.entries(events)) api.addEventListener(type, heard);
    this.placing.begin();
    this.#end = () => {
      this.placing.end();
      unwatch();
      for (const [type, heard] of Object.entries(events)) api.removeEventListener(type, heard);
      this.#panel.detach();
    };
  }

  #finish() {
    this.#end?.();
    this.#end = null;
  }

  /** ComfyUI's own message about an error comes in a dialog, and in newer frontends behind a button. */
  #failed({ node_id: id, exception_message: message }) {
    const ids = executionIds(this.node, rootOf(this.node.graph));
    if (ids.includes(String(id))) this.#panel.fail(String(message ?? "").trim());
  }

  /** Show the current state; returns whether the node is still in the graph. */
  #update() {
    const root = rootOf(this.node.graph);
    const ids = executionIds(this.node, root);
    const name = valueOf(this.node, "run_name");
    const id = chooseRun(runs.list, { ids, workflow: root?.id }, remembered(this.node, REMEMBERED), name);
    if (id !== null) remember(this.node, REMEMBERED, id);
    this.#panel.show(id);
    this.#sayUnused();
    return ids.length > 0;
  }

  #sayUnused() {
    const [algorithm, settings] = ["algorithm", "settings"].map((name) => valueOf(this.node, name) ?? "");
    this.#panel.showUnused(unused(algorithm, usedBy, { wired: isWired(this.node, "critic"), settings }));
  }
}

/** Shows the pictures that are voted on in a node; those that the taste showed last from when the node is loaded. */
class BallotView {
  #ballot = new Ballot();
  #told = null; // what is shown

  constructor(node) {
    this.node = node;
    this.placing = new Placing(node, this.#ballot.element);
    addWidget(node, WIDGET, this.#ballot.element, () => leastBallot(this.#ballot.isShown));
    after(node, "onAdded", () => this.begin());
    after(node, "onRemoved", () => this.placing.end());
    after(node, "onConfigure", () => this.#recall());
    after(node, "onExecuted", (output) => this.#show(output?.tdpo_ballot?.[0]));
    if (node.graph) this.begin();
  }

  begin() {
    this.placing.begin();
  }

  async #recall() {
    if (!isWired(this.node, "pictures")) return; // another node has shown the pictures of its taste
    const name = valueOf(this.node, "name") ?? remembered(this.node, VOTED_ON);
    const told = name && (await ballotOf(name).catch(() => null)); // without an answer, the next Run shows them
    if (told?.pictures.length && !this.#told) this.#show(told);
  }

  #show(told) {
    if (!told) return;
    this.#told = told;
    if (told.pictures.length) remember(this.node, VOTED_ON, told.name);
    this.#ballot.show(told);
    const [width, height] = this.node.computeSize();
    this.node.setSize([Math.max(this.node.size[0], width), Math.max(this.node.size[1], height)]);
  }
}

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

function isWired(node, name) {
  const index = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  return index >= 0 && node.isInputConnected(index);
}

/** The value of a widget of the node; null if it comes from a wire. */
const valueOf = (node, name) => (isWired(node, name) ? null : (widgetOf(node, name)?.value ?? null));

/** A different seed starts a different run, so ComfyUI must not change it after each one unless asked to. */
function keepSeed(node) {
  const control = node.widgets.find(({ name }) => name === "control_after_generate");
  if (control) control.value = "fixed";
}

/**
 * Whether hidden widgets leave no gap: seen in frontend 1.58, not in 1.27. Vue nodes fold advanced widgets themselves.
 */
function canFold() {
  const [major, minor] = (window.__COMFYUI_FRONTEND_VERSION__ ?? "0.0").split(".").map(Number);
  return !window.LiteGraph?.vueNodesMode && (major > 1 || minor >= 58);
}

/** Hide the widgets that few need, or show them. */
function fold(node, hidden) {
  for (const widget of node.widgets) if (widget.options?.advanced) widget.hidden = hidden;
}

/** The same, and fit the node's height. */
function refold(node, hidden) {
  const before = node.computeSize()[1];
  fold(node, hidden);
  node.setSize([node.size[0], node.size[1] + node.computeSize()[1] - before]);
}
