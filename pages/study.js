// The study's page: one question at a time. What is chosen is kept in the browser until it is
// saved as a file or sent. Which image is whose is not known here.
"use strict";

const study = JSON.parse(document.getElementById("data").textContent);
const questions = new Map(study.questions.map((question) => [question.id, question]));
const STORE = `study-${study.id}`;
const TOO_SOON = 250;       // milliseconds: the second half of a double click is not a choice
const SIDES = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right" };
const served = location.protocol.startsWith("http");

const $ = (id) => document.getElementById(id);
let state = restore() || fresh();
let shownAt = 0;


// ---------------------------------------------------------------------------------------------
// What is kept: who answers, in which order, what was chosen

function fresh() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  const id = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const order = shuffled([...questions.keys()]);
  return { id, name: "", order, chosen: {}, position: 0, begun: null, ended: null, kept: null };
}

function shuffled(items) {
  for (let i = items.length - 1; i > 0; i--) {
    const k = crypto.getRandomValues(new Uint32Array(1))[0] % (i + 1);
    [items[i], items[k]] = [items[k], items[i]];
  }
  return items;
}

function restore() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE));
    const whole = found && found.order.length === questions.size
      && found.order.every((id) => questions.has(id));
    return whole ? found : null;
  } catch {
    return null;            // nothing there, damaged, or the browser keeps nothing
  }
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    $("warning").hidden = false;
  }
}


// ---------------------------------------------------------------------------------------------
// What is shown

function show() {
  const at = !state.begun ? "start" : state.position < state.order.length ? "ask" : "end";
  for (const id of ["start", "ask", "end"]) $(id).hidden = id !== at;
  if (at === "ask") showQuestion(questions.get(state.order[state.position]));
  if (at === "end") showEnd();
  document.querySelector(`#${at} h1`).focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function showQuestion(question) {
  const total = state.order.length;
  $("count").textContent = `${state.position + 1} of ${total}`;
  $("bar").max = total;
  $("bar").value = Object.keys(state.chosen).length;
  $("class").textContent = question.class;
  $("real").replaceChildren(...question.real.map((source, i) => {
    const item = document.createElement("li");
    item.className = "tile";
    item.append(picture(new Image(), source, `real image ${i + 1}: ${question.class}`));
    return item;
  }));
  const chosen = state.chosen[question.id];
  for (const side of ["left", "right"]) {
    picture($(side).querySelector("img"), question[side], `the image at the ${side}`);
    $(side).setAttribute("aria-pressed", String(chosen?.side === side));
  }
  $("back").disabled = state.position === 0;
  $("forward").disabled = !chosen;
  fit();
  shownAt = performance.now();
}

function picture(image, source, words) {
  image.src = source;
  image.alt = words;
  image.draggable = false;
  return image;
}

// Enlarge by a whole number of the screen's own pixels, so that all pixels are squares of one size;
// where that would leave much room empty, as large images do, fill the room smoothly
function fit() {
  const ratio = window.devicePixelRatio || 1;
  for (const image of document.querySelectorAll("#ask .tile img")) {
    const space = image.parentElement.clientWidth;
    const whole = Math.floor(space * ratio / study.size + 0.01) * study.size / ratio;
    const fits = whole >= 0.7 * space;
    image.style.width = `${fits ? whole : space}px`;
    image.style.imageRendering = fits ? "pixelated" : "auto";
  }
}

function showEnd() {
  $("send").hidden = !served || state.kept === "sent";
  $("save").className = $("send").hidden && !state.kept ? "primary" : "";
  $("revise").hidden = state.kept === "sent";
  $("how").textContent = {
    sent: "They have been sent; you may close this page.",
    saved: "Hand the saved file to whoever asked you.",
  }[state.kept] || (served
    ? "Please send them now, or save them as a file and hand it over."
    : "Please save them as a file, and hand it to whoever asked you.");
}


// ---------------------------------------------------------------------------------------------
// What is done

function choose(side) {
  const now = performance.now();
  if ($("ask").hidden || now - shownAt < TOO_SOON) return;
  const seconds = Math.round(now - shownAt) / 1000;
  const at = new Date().toISOString();
  state.chosen[state.order[state.position]] = { side, seconds, at };
  state.kept = null;
  go(1);
}

function go(step) {
  const next = state.position + step;
  const answered = step < 0 || state.chosen[state.order[state.position]];
  if (!state.begun || next < 0 || next > state.order.length || !answered) return;
  state.position = next;
  if (next === state.order.length) state.ended = new Date().toISOString();
  keep();
  show();
}

function answers() {
  return {
    format: "capacity-manipulation/1",
    kind: "study answers",
    study: study.id,
    evaluator: { id: state.id, name: state.name },
    begun: state.begun,
    ended: state.ended,
    answers: state.order.map((id) => ({ question: id, ...state.chosen[id] })),
  };
}

function save() {
  const text = JSON.stringify(answers(), null, 1) + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `answers-${study.id}-${state.id}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  if (state.kept !== "sent") state.kept = "saved";
  keep();
  show();
  $("said").textContent = `Saved as ${link.download}`;
}

async function send() {
  $("send").disabled = true;
  let problem = "";
  try {
    const headers = { "Content-Type": "application/json" };
    const body = JSON.stringify(answers());
    const reply = await fetch("answers", { method: "POST", headers, body });
    if (!reply.ok) problem = (await reply.text()).slice(0, 200) || `error ${reply.status}`;
  } catch {
    problem = "no connection";
  }
  $("send").disabled = false;
  if (!problem) state.kept = "sent";
  keep();
  show();
  $("said").textContent = problem
    ? `They could not be sent (${problem}). Try again, or save them as a file and hand it over.`
    : "Sent.";
}

function another() {
  if (!state.kept && !confirm("These answers are neither saved nor sent. Drop them?")) return;
  state = fresh();
  keep();
  $("name").value = "";
  $("said").textContent = "";
  show();
}

function key(event) {
  const held = event.repeat || event.ctrlKey || event.altKey || event.metaKey;
  if (held || event.target.tagName === "INPUT") return;
  if (!$("ask").hidden && SIDES[event.key]) choose(SIDES[event.key]);
  else if ($("start").hidden && event.key === "Backspace" && state.kept !== "sent") go(-1);
  else return;
  event.preventDefault();
}


// ---------------------------------------------------------------------------------------------

for (const element of document.querySelectorAll(".total")) element.textContent = questions.size;
$("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  state.name = $("name").value.trim();
  state.begun = new Date().toISOString();
  keep();
  show();
});
$("left").addEventListener("click", () => choose("left"));
$("right").addEventListener("click", () => choose("right"));
$("back").addEventListener("click", () => go(-1));
$("forward").addEventListener("click", () => go(1));
$("revise").addEventListener("click", () => go(-1));
$("save").addEventListener("click", save);
$("send").addEventListener("click", send);
$("another").addEventListener("click", another);
document.addEventListener("keydown", key);
window.addEventListener("resize", fit);
window.addEventListener("storage", (event) => {     // another window of this browser goes on
  if (event.key === STORE) location.reload();
});
show();
