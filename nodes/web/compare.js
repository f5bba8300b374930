// A dialog that compares images before and after: the same prompts and noise, with a divider to drag.

import { keepPresses, make, makeButton, setText } from "./dom.js";
import { gridURL, strengthURL } from "./runs.js";

const AS_TRAINED = "as trained, training prompts";

export class Comparison {
  #status = null;
  #take = null;

  constructor() {
    this.before = make("img", "tdpo-before", { draggable: "false" });
    this.after = make("img", "tdpo-after", { draggable: "false" });
    this.left = make("span", "tdpo-left");
    this.right = make("span", "tdpo-right");
    this.cut = make("input", "tdpo-cut", { type: "range", min: 0, max: 100, "aria-label": "Divider" });
    this.stage = make(
      "div", "tdpo-stage", {}, this.before, this.after, make("i", "tdpo-divider"), this.left, this.right, this.cut,
    );
    this.epoch = make("select", "", { "aria-label": "Epoch" });
    this.strength = make("select", "", { "aria-label": "Strength" });
    this.title = make("strong", "tdpo-run");
    this.use = makeButton("tdpo-button");
    this.close = makeButton("tdpo-button", "Close");
    this.element = make(
      "dialog", "tdpo-comparison", { "aria-label": "Comparison" },
      make("div", "tdpo-head", {}, this.title, this.close),
      this.stage,
      make("div", "tdpo-row", {}, this.epoch, this.strength, this.use),
    );
    this.cut.addEventListener("input", () => this.#divide());
    this.epoch.addEventListener("change", () => this.#chooseEpoch());
    this.strength.addEventListener("change", () => this.#draw());
    this.close.addEventListener("click", () => this.element.close());
    this.use.addEventListener("click", () => this.#used());
    this.element.addEventListener("close", () => this.element.remove());
    keepPresses(this.element);
  }

  /** Open on an epoch of a run; `take` is called with what LoRA Apply is to take. */
  open(status, epoch, take) {
    this.#status = status;
    this.#take = take;
    setText(this.title, status.id);
    const shown = new Set([...status.grids, ...Object.keys(status.strengths).map(Number)]);
    const epochs = [...shown].filter((n) => n > 0).sort((a, b) => a - b);
    this.epoch.replaceChildren(...epochs.map((n) => new Option(`epoch ${n}`, n, false, n === epoch)));
    this.cut.value = 50;
    this.#divide();
    document.body.append(this.element);
    this.element.showModal();
    this.#chooseEpoch();
  }

  #chooseEpoch() {
    const { grids, strengths } = this.#status;
    const epoch = Number(this.epoch.value);
    const drawn = (strengths[epoch] ?? []).map((s) => new Option(`strength ${s}, unseen prompts`, s));
    const trained = grids.includes(epoch) ? [new Option(AS_TRAINED, "")] : [];
    this.strength.replaceChildren(...trained, ...drawn);
    this.#draw();
  }

  #draw() {
    const { id, kept } = this.#status;
    const epoch = Number(this.epoch.value);
    const strength = this.strength.value;
    this.before.src = strength ? strengthURL(id, 0, 0) : gridURL(id, 0);
    this.after.src = strength ? strengthURL(id, epoch, strength) : gridURL(id, epoch);
    setText(this.left, "before training");
    setText(this.right, strength ? `epoch ${epoch}, strength ${strength}` : `epoch ${epoch}`);
    this.before.alt = "Images before training";
    this.after.alt = `The same after ${this.right.textContent}`;
    this.use.hidden = !kept.includes(epoch);
    setText(this.use, `Use ${this.right.textContent}`);
  }

  #divide() {
    this.stage.style.setProperty("--tdpo-divider", `${this.cut.value}%`);
  }

  #used() {
    this.#take({ snapshot: "epoch", epoch: Number(this.epoch.value), strength: Number(this.strength.value || 1) });
    this.element.close();
  }
}
