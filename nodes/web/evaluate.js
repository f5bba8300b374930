// The results of TDPO Evaluate in the node: the plot and the tables of the run's last evaluation.
// All text from the server is set as text, never as HTML.

import { app } from "../../scripts/app.js";
import { keepPresses, make, setText } from "./dom.js";
import { addWidget, after, Placing, remember, remembered, rootOf } from "./host.js";
import { nodesWithin } from "./model.js";
import { evaluationOf, plotURL } from "./runs.js";

const NODE = "TDPOEvaluate";
const WIDGET = "tdpo_evaluation"; // our own type: the Vue renderer replaces the types it knows
const REMEMBERED = "tdpo_evaluated"; // property of the node: the run that it evaluated last
const WIDTH = 600; // pixels of a new node
const HEIGHT = 380; // pixels of the panel, as in tdpo.css
const PROMPTS = 100; // pixels that the prompts take at most
const HINT = "Press Run: the rewards of the run's snapshots appear here.";

const views = new WeakMap(); // by node

app.registerExtension({
  name: "comfy_tdpo.evaluation",
  nodeCreated(node) {
    if (node.comfyClass === NODE) views.set(node, new EvaluationView(node));
  },
  afterConfigureGraph() {
    for (const node of nodesWithin(rootOf(app.graph))) views.get(node)?.begin();
  },
});

/** Shows what the node found last, from when the node is added to a graph until it is removed. */
class EvaluationView {
  #panel = new EvaluationPanel();

  constructor(node) {
    this.node = node;
    this.placing = new Placing(node, this.#panel.element);
    addWidget(node, WIDGET, this.#panel.element, () => HEIGHT, true);
    const prompts = node.widgets.find(({ name }) => name === "prompts");
    if (prompts?.options) prompts.options.getMaxHeight = () => PROMPTS; // or it takes half of a tall node
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, WIDTH), height]);
    after(node, "onAdded", () => this.begin());
    after(node, "onRemoved", () => this.placing.end());
    after(node, "onConfigure", () => this.#panel.show(remembered(node, REMEMBERED)));
    after(node, "onExecuted", (output) => this.#remember(output?.tdpo_evaluation?.[0]));
    if (node.graph) this.begin();
  }

  begin() {
    this.placing.begin();
    this.#panel.show(remembered(this.node, REMEMBERED));
  }

  #remember(run) {
    if (typeof run !== "string") return;
    remember(this.node, REMEMBERED, run);
    this.#panel.show(run, true);
  }
}

/** The plot above the tables; a hint before there are any. */
class EvaluationPanel {
  #shown = null; // the id of the run that is shown

  constructor() {
    this.hint = make("p", "tdpo-hint", { role: "status" }, HINT);
    this.name = make("strong", "tdpo-state");
    this.plot = make("img", "", { draggable: "false", alt: "Rewards of the snapshots; the tables have the numbers" });
    this.link = make("a", "", { target: "_blank", rel: "noopener", "aria-label": "The plot, in full size" }, this.plot);
    this.tables = make("div", "tdpo-tables");
    this.body = make("div", "tdpo-body", {}, this.name, this.link, this.tables);
    const label = { "aria-label": "Evaluation", tabindex: "0" };
    this.element = make("section", "tdpo-panel tdpo-evaluation", label, this.hint, this.body);
    this.plot.addEventListener("error", () => (this.link.hidden = true));
    this.plot.addEventListener("load", () => (this.link.hidden = false));
    keepPresses(this.element);
    this.body.hidden = true;
  }

  /** Show the last evaluation of the run with this id, or the hint; `again` if it has changed. */
  async show(id, again = false) {
    if (id === this.#shown && !again) return;
    this.#shown = id;
    const [found, problem] = id === null ? [null, HINT] : await evaluationOf(id);
    if (id !== this.#shown) return; // another one was asked for meanwhile
    this.hint.hidden = found !== null;
    this.body.hidden = found === null;
    setText(this.hint, problem);
    if (found === null) return;
    setText(this.name, id);
    this.plot.src = this.link.href = `${plotURL(id, "evaluation")}?${Date.now()}`;
    this.tables.replaceChildren(...found.tables.map(tableOf));
  }
}

function tableOf({ title, rows: [head, ...rows] }) {
  const cells = (tag, row) => make("tr", "", {}, ...row.map((text) => make(tag, "", {}, text)));
  const parts = [make("caption", "", {}, title), make("thead", "", {}, cells("th", head))];
  return make("table", "tdpo-table", {}, ...parts, make("tbody", "", {}, ...rows.map((row) => cells("td", row))));
}
