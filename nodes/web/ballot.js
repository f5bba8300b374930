// The pictures in TDPO Taste: each click on one is a vote.

import { keepPresses, make, makeButton, setText } from "./dom.js";
import { ballotText } from "./model.js";
import { shownURL, vote } from "./runs.js";

const HINT = "Press Run: the connected pictures appear here to be voted on.";

/** The height in pixels that it needs to show some rows of pictures, or only the hint. */
export const leastHeight = (isShown) => (isShown ? 320 : 60);

export class Ballot {
  #told = null; // what the server has told: the taste's name and counts, and its pictures
  #liked = true; // what a click on a picture says
  #buttons = new Map(); // file -> its button

  constructor() {
    this.hint = make("p", "tdpo-hint", {}, HINT);
    this.like = makeButton("tdpo-button", "♥ Like");
    this.dislike = makeButton("tdpo-button", "✕ Dislike");
    this.rest = makeButton("tdpo-button", "✕ Dislike the rest");
    this.said = make("p", "tdpo-message", { role: "status" });
    this.problem = make("p", "tdpo-problem", { role: "alert" });
    this.pictures = make("div", "tdpo-ballot");
    this.body = make(
      "div", "tdpo-body", {},
      this.said, this.problem,
      make("div", "tdpo-row", {}, this.like, this.dislike, this.rest),
      this.pictures,
    );
    this.element = make("section", "tdpo-panel tdpo-votes", { "aria-label": "Votes" }, this.hint, this.body);
    this.like.addEventListener("click", () => this.#press(true));
    this.dislike.addEventListener("click", () => this.#press(false));
    this.rest.addEventListener("click", () => this.#dislikeTheRest());
    for (const control of [this.like, this.dislike, this.rest, this.pictures]) keepPresses(control);
    this.#press(true);
    this.show(null);
  }

  get isShown() {
    return Boolean(this.#told?.pictures.length);
  }

  /** Show what the node told when it ran; null before. */
  show(told) {
    this.#told = told;
    this.hint.hidden = this.isShown;
    this.body.hidden = !this.isShown;
    this.#buttons = new Map((told?.pictures ?? []).map((picture, i) => [picture.file, this.#button(picture, i)]));
    this.pictures.replaceChildren(...this.#buttons.values());
    this.#say();
  }

  #button({ file, liked }, i) {
    const image = make("img", "", { src: shownURL(file), alt: `Picture ${i + 1}`, draggable: "false" });
    const button = make("button", "tdpo-picture", { type: "button" }, image, make("span", "tdpo-mark"));
    button.addEventListener("click", () => this.#vote([file], this.#liked));
    mark(button, liked);
    return button;
  }

  #press(liked) {
    this.#liked = liked;
    this.like.setAttribute("aria-pressed", String(liked));
    this.dislike.setAttribute("aria-pressed", String(!liked));
  }

  #undecided() {
    return (this.#told?.pictures ?? []).filter(({ liked }) => liked === null).map(({ file }) => file);
  }

  async #dislikeTheRest() {
    this.rest.disabled = true;
    await this.#vote(this.#undecided(), false);
    this.rest.disabled = false;
  }

  /** Send a vote for each of the files, and mark those that are kept. */
  async #vote(files, liked) {
    const told = this.#told;
    setText(this.problem, "");
    try {
      for (const file of files) {
        Object.assign(told, await vote(told.name, { picture: { shown: file }, liked }));
        told.pictures.find((picture) => picture.file === file).liked = liked ? 1 : 0;
        if (told === this.#told) mark(this.#buttons.get(file), liked);
      }
    } catch (error) {
      setText(this.problem, `The vote was not kept: ${error.message}`);
    }
    this.#say();
  }

  #say() {
    this.problem.hidden = !this.problem.textContent;
    this.rest.hidden = !this.#told?.liked || !this.#undecided().length;
    if (this.isShown) setText(this.said, ballotText(this.#told));
  }
}

/** Show a vote on a picture's button; null is none. */
function mark(button, liked) {
  const words = liked === null ? "" : liked ? "liked" : "disliked";
  button.dataset.vote = words;
  setText(button.lastChild, liked === null ? "" : liked ? "♥" : "✕");
  const image = button.firstChild;
  image.alt = image.alt.split(",")[0] + (words && `, ${words}`);
}
