// Small multiples: one pair of axes per reward, as their units differ, above a shared epoch axis.

import { curves, lastShown, limits, limitsWithBand, ticks, ticksWithRoom } from "./model.js";
import { heading, labels, reading, scale, spoken } from "./model.js";

const SVG = "http://www.w3.org/2000/svg";
const RIGHT = 10, TITLE = 20, GAP = 10, FOOTER = 30; // pixels
const LEAST = 40, DIGIT = 6.6; // pixels for the labels of the values, and for each sign of them
const SMALLEST = 26; // minimum height of the axes of a held-out reward; those of the training reward are twice as high

/** The minimum height at which a chart of `count` curves is readable. */
export const chartHeight = (count) => FOOTER + count * (TITLE + GAP) + (count + 1) * SMALLEST;

function shape(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const round = (x) => Math.round(x * 100) / 100;

export class Chart {
  /** `onPoint` is called with the epoch under the pointer, or null; `onPick` with one that is clicked. */
  constructor(onPoint, onPick) {
    this.onPoint = onPoint;
    this.element = shape("svg", { class: "tdpo-chart", role: "img" });
    this.element.addEventListener("pointermove", (event) => this.#show(this.#epochAt(event)));
    this.element.addEventListener("pointerleave", () => this.#show(null));
    this.element.addEventListener("click", (event) => onPick(this.#epochAt(event)));
  }

  /** Draw the curves of a run in `width` x `height` pixels, with a mark at the `picked` epoch, unless it is null. */
  draw(status, metrics, width, height, picked) {
    Object.assign(this, { status, metrics, width, height, picked });
    this.curves = curves(status, metrics);
    this.epochs = [1, lastShown(status.epochs, metrics.at(-1)?.epoch ?? 1)];
    this.element.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.element.setAttribute("aria-label", spoken(status, metrics));
    this.#render();
  }

  #epochAt(event) {
    if (!this.metrics?.length) return null;
    const box = this.element.getBoundingClientRect(); // in pixels of the screen: the canvas may be zoomed
    const x = ((event.clientX - box.left) / box.width) * this.width;
    const distance = ({ epoch }) => Math.abs(this.x(epoch) - x);
    return this.metrics.reduce((a, b) => (distance(b) < distance(a) ? b : a)).epoch;
  }

  #show(epoch) {
    if (epoch === this.pointed) return;
    this.pointed = epoch;
    this.onPoint(epoch);
    if (this.metrics) this.#render();
  }

  #render() {
    const shares = this.curves.map(({ trained }) => (trained ? 2 : 1));
    const free = this.height - FOOTER - this.curves.length * (TITLE + GAP);
    const share = Math.max(free, 0) / shares.reduce((a, b) => a + b, 0);
    let top = 0;
    const panels = this.curves.map((curve, i) => {
      const height = shares[i] * share;
      const panel = { ...this.#yTicks(curve, height), top: top + TITLE, bottom: top + TITLE + height };
      top = panel.bottom + GAP;
      return panel;
    });
    const longest = Math.max(0, ...panels.flatMap(({ words }) => words.map((word) => word.length)));
    this.left = Math.max(LEAST, 6 + DIGIT * longest);
    this.x = scale(this.epochs, [this.left, this.width - RIGHT]);
    const parts = this.curves.map((curve, i) => this.#panel(curve, panels[i]));
    this.element.replaceChildren(...parts, this.#epochAxis(top - GAP));
  }

  #yTicks({ trained, points }, height) {
    const domain = trained ? limitsWithBand(points) : limits(points);
    const marks = points.length ? ticksWithRoom(...domain, height) : [];
    return { domain, marks, words: labels(marks) };
  }

  #panel({ name, trained, points }, { domain, marks, words, top, bottom }) {
    const y = scale(domain, [bottom, top]);
    const at = this.#indexAt(points);
    const read = reading(points, at);
    const value = shape("text", { x: this.width - RIGHT, y: top - 6, class: "tdpo-value" }, read);
    const kind = trained ? "tdpo-trained" : "tdpo-held-out";
    const group = shape("g", { class: kind }, this.#heading(name, trained, read, top - 6), value);
    group.append(...this.#yAxis(marks, words, y));
    group.append(...this.#overoptimised(top, bottom));
    group.append(shape("line", { x1: this.left, x2: this.width - RIGHT, y1: bottom, y2: bottom, class: "tdpo-axis" }));
    if (points.length) group.append(...this.#curve(points, at, y, trained), ...this.#pointer(top, bottom));
    return group;
  }

  #heading(name, trained, value, y) {
    const role = trained ? "trained on" : "held out";
    const [short, shown] = heading(name, role, value, this.width - this.left - RIGHT);
    const quiet = shape("tspan", { class: "tdpo-quiet", dx: 6 }, shown);
    const whole = shape("title", {}, `${name}, ${role}`);
    return shape("text", { x: this.left, y, class: "tdpo-name" }, short, quiet, whole);
  }

  get #marked() {
    return this.pointed ?? this.picked ?? null;
  }

  #indexAt(points) {
    const found = points.findLastIndex(({ epoch }) => epoch <= this.#marked);
    return this.#marked === null || found < 0 ? points.length - 1 : found;
  }

  #yAxis(marks, words, y) {
    return marks.flatMap((mark, i) => [
      shape("line", { x1: this.left, x2: this.width - RIGHT, y1: round(y(mark)), y2: round(y(mark)), class: "tdpo-grid" }),
      shape("text", { x: this.left - 6, y: round(y(mark)) + 3.5, class: "tdpo-tick tdpo-end" }, words[i]),
    ]);
  }

  #curve(points, at, y, trained) {
    const place = ({ epoch, value }) => `${round(this.x(epoch))},${round(y(value))}`;
    const edge = (sign) => points.map(({ epoch, value, spread }) => place({ epoch, value: value + sign * spread }));
    const parts = [];
    const band = [...edge(1), ...edge(-1).reverse()].join(" ");
    if (trained) parts.push(shape("polygon", { points: band, class: "tdpo-band" }));
    parts.push(shape("polyline", { points: points.map(place).join(" "), class: "tdpo-curve" }));
    const [cx, cy] = place(points[at]).split(",");
    parts.push(shape("circle", { cx, cy, r: 3.5, class: "tdpo-dot" }));
    return parts;
  }

  #overoptimised(top, bottom) {
    if (this.status.overoptimised == null) return [];
    const [left, right] = [this.status.overoptimised, this.epochs[1]].map((epoch) => round(this.x(epoch)));
    const size = { x: left, y: top, width: Math.max(right - left, 1), height: Math.max(bottom - top, 0) };
    return [shape("rect", { ...size, class: "tdpo-overoptimised" })];
  }

  #pointer(top, bottom) {
    if (this.#marked === null) return [];
    const x = round(this.x(this.#marked));
    return [shape("line", { x1: x, x2: x, y1: top, y2: bottom, class: "tdpo-pointer" })];
  }

  #epochAxis(top) {
    const marks = ticks(...this.epochs, Math.max(2, Math.floor((this.width - this.left - RIGHT) / 48)), true);
    const numbers = marks.map((tick) =>
      shape("text", { x: round(this.x(tick)), y: top + 14, class: "tdpo-tick tdpo-middle" }, String(tick)),
    );
    const words = this.#marked === null ? "epoch" : `epoch ${this.#marked}`;
    const middle = (this.left + this.width - RIGHT) / 2;
    return shape("g", {}, ...numbers, shape("text", { x: middle, y: top + 27, class: "tdpo-tick tdpo-middle" }, words));
  }
}
