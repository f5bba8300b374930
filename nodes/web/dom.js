// Small helpers for elements.

export function make(tag, className, attributes = {}, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export const makeButton = (className, text = "") => make("button", className, { type: "button" }, text);

/** Set a text only if it has changed: screen readers read it out every time it is set. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Keep a press of the main button on `element` from reaching the canvas, which would drag the node. */
export function keepPresses(element) {
  element.addEventListener("pointerdown", (event) => event.button === 0 && event.stopPropagation());
}
