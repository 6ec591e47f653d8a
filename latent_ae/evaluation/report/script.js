"use strict";

const all = (selector, from = document) => [...from.querySelectorAll(selector)];

// A picture that the page shows more than once is stored once.
for (const image of all("img[data-same]")) {
  image.src = document.getElementById(image.dataset.same).src;
}

const themes = ["auto", "light", "dark"];
const theme = document.getElementById("theme");
theme.addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || "auto";
  const next = themes[(themes.indexOf(now) + 1) % themes.length];
  document.documentElement.dataset.theme = next;
  theme.textContent = `Theme: ${next}`;
});

// Models are compared at the same place: the sliders of one picture move together.
document.addEventListener("input", (event) => {
  if (event.target.type !== "range") return;
  const group = event.target.closest(".picture, dialog");
  for (const frame of all(".frame", group)) {
    frame.style.setProperty("--at", `${event.target.value}%`);
    frame.querySelector("input").value = event.target.value;
  }
});

function press(buttons, chosen) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
}

for (const button of all("[data-view]")) {
  button.addEventListener("click", () => {
    press(all("[data-view]", button.parentElement), button);
    for (const frame of all(".frame", button.closest("section"))) {
      frame.classList.toggle("error", button.dataset.view === "error");
    }
  });
}

const dialog = document.getElementById("full");
const room = dialog.querySelector(".scroll");
const error = dialog.querySelector("[data-error]");
let opener = null;

function zoom(button) {
  press(all("[data-zoom]", dialog), button);
  const frame = room.querySelector(".frame");
  const factor = Number(button.dataset.zoom);
  frame.style.setProperty("--width", `${frame.querySelector("img").naturalWidth * factor}px`);
}

for (const button of all("[data-full]")) {
  button.addEventListener("click", () => {
    const pair = button.closest(".pair");
    const frame = pair.querySelector(".frame").cloneNode(true);
    for (const image of all("img", frame)) image.removeAttribute("id");
    frame.querySelector("input").value = pair.querySelector("input").value;
    document.getElementById("full-title").textContent =
      `${pair.dataset.key}, ${pair.dataset.model}`;
    room.replaceChildren(frame);
    error.setAttribute("aria-pressed", String(frame.classList.contains("error")));
    opener = button;
    dialog.showModal();
    zoom(dialog.querySelector('[data-zoom="1"]'));
    frame.querySelector("input").focus();
  });
}
for (const button of all("[data-zoom]")) button.addEventListener("click", () => zoom(button));
error.addEventListener("click", () => {
  const on = room.querySelector(".frame").classList.toggle("error");
  error.setAttribute("aria-pressed", String(on));
});
dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => {
  room.replaceChildren();
  opener?.focus();
});

// The contents mark the section that is being read.
const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  },
  { rootMargin: "-10% 0px -80% 0px" },
);
for (const section of all("main > section")) watcher.observe(section);
