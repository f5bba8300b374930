// A dialog that compares images before and after: the same prompts and noise, with a divider to drag. Its images can be
// voted on: the votes become a taste, which TDPO Taste makes a reward.

import { keepPresses, make, makeButton, setText } from "./dom.js";
import { cellAt, numberOf, tasteOf } from "./model.js";
import { gridURL, strengthURL, vote } from "./runs.js";

const START = 38; // percent: where the divider is at first, away from the gaps between images
const DRAG = "Drag the line between before and after.";
const AS_TRAINED = "as trained, training prompts";

export class Comparison {
  #status = null;
  #take = null;
  #liked = null; // what a click on an image says: true, false, or null for nothing

  constructor() {
    this.before = make("img", "tdpo-before", { draggable: "false" });
    this.after = make("img", "tdpo-after", { draggable: "false" });
    this.left = make("span", "tdpo-left");
    this.right = make("span", "tdpo-right");
    this.cut = make("input", "tdpo-cut", { type: "range", min: 0, max: 100, "aria-label": "Divider" });
    this.marks = make("div", "tdpo-marks");
    this.stage = make(
      "div", "tdpo-stage", {},
      this.before, this.after, this.marks, make("i", "tdpo-divider"), this.left, this.right, this.cut,
    );
    this.taste = make("input", "tdpo-taste", { type: "text", "aria-label": "Name of the taste" });
    this.like = makeButton("tdpo-button", "♥ Like");
    this.dislike = makeButton("tdpo-button", "✕ Dislike");
    this.said = make("p", "tdpo-said tdpo-quiet", { role: "status" });
    this.epoch = make("select", "", { "aria-label": "Epoch" });
    this.strength = make("select", "", { "aria-label": "Strength" });
    this.title = make("strong", "tdpo-title");
    this.use = makeButton("tdpo-button");
    this.close = makeButton("tdpo-button", "Close");
    this.element = make(
      "dialog", "tdpo-comparison", { "aria-label": "Comparison" },
      make("div", "tdpo-head", {}, this.title, this.close),
      this.stage,
      make("div", "tdpo-row", {}, this.epoch, this.strength, this.use),
      make("div", "tdpo-row", {}, make("span", "", {}, "Votes for taste"), this.taste, this.like, this.dislike),
      this.said,
    );
    this.cut.addEventListener("input", () => this.#divide());
    this.epoch.addEventListener("change", () => this.#chooseEpoch());
    this.strength.addEventListener("change", () => this.#draw());
    this.like.addEventListener("click", () => this.#vote(this.#liked === true ? null : true));
    this.dislike.addEventListener("click", () => this.#vote(this.#liked === false ? null : false));
    this.stage.addEventListener("click", (event) => this.#click(event));
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
    this.taste.value = tasteOf(status);
    const shown = new Set([...status.grids, ...Object.keys(status.strengths ?? {}).map(Number)]);
    const epochs = [...shown].filter((n) => n > 0).sort((a, b) => a - b);
    this.epoch.replaceChildren(...epochs.map((n) => new Option(`epoch ${n}`, n, false, n === epoch)));
    this.cut.value = START;
    this.#divide();
    document.body.append(this.element);
    this.element.showModal();
    this.#chooseEpoch();
  }

  #chooseEpoch() {
    const { grids, strengths = {} } = this.#status;
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
    this.marks.replaceChildren(); // they belong to the images that were shown
    this.#vote(strength ? null : this.#liked);
    for (const button of [this.like, this.dislike]) button.disabled = Boolean(strength);
    this.use.hidden = !kept.includes(epoch);
    setText(this.use, `Use ${this.right.textContent}`);
  }

  #divide() {
    this.stage.style.setProperty("--tdpo-divider", `${this.cut.value}%`);
  }

  /** Let clicks on images be votes, or move the divider again. */
  #vote(liked) {
    this.#liked = liked;
    this.like.setAttribute("aria-pressed", String(liked === true));
    this.dislike.setAttribute("aria-pressed", String(liked === false));
    this.stage.classList.toggle("tdpo-voting", liked !== null);
    setText(this.said, liked === null ? DRAG : `Click the images that you ${liked ? "like" : "dislike"}.`);
  }

  async #click(event) {
    if (this.#liked === null) return;
    const box = this.stage.getBoundingClientRect();
    const place = { x: event.clientX - box.left, y: event.clientY - box.top };
    const isBefore = place.x < (box.width * this.cut.value) / 100;
    const { naturalWidth: width, naturalHeight: height } = isBefore ? this.before : this.after;
    const isSeen = this.before.complete && this.after.complete; // else the images before them are still shown
    const cell = isSeen && this.#status.grid_shape && cellAt(place, box, { width, height }, this.#status.grid_shape);
    if (!cell) return;
    if (!this.taste.value.trim()) return setText(this.said, "Name the taste first.");
    const epoch = isBefore ? 0 : Number(this.epoch.value);
    const liked = this.#liked;
    try {
      const { votes, name } = await vote(this.taste.value.trim(), { picture: { run: this.#status.id, epoch, ...cell }, liked });
      this.#mark(place, box, liked);
      setText(this.said, `${numberOf(votes, "vote")} in taste ${name}. TDPO Taste makes them a reward.`);
    } catch (error) {
      setText(this.said, `The vote was not kept: ${error.message}`);
    }
  }

  #mark({ x, y }, { width, height }, liked) {
    const mark = make("span", liked ? "tdpo-liked" : "tdpo-disliked", {}, liked ? "♥" : "✕");
    Object.assign(mark.style, { left: `${(100 * x) / width}%`, top: `${(100 * y) / height}%` });
    this.marks.append(mark);
  }

  #used() {
    this.#take({ snapshot: "epoch", epoch: Number(this.epoch.value), strength: Number(this.strength.value || 1) });
    this.element.close();
  }
}
