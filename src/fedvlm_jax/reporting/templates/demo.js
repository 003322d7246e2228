"use strict";
const find = (id) => document.getElementById(id);
const form = find("form"), client = find("client"), file = find("file"), drop = find("drop"), shown = find("shown");
const samples = find("samples"), question = find("question"), ask = find("ask"), results = find("results");
const several = form.dataset.several === "true", chooses = form.dataset.chooses === "true";
const limit = Number(form.dataset.limit);
let files = [], sample = null, busy = false;

const make = (tag, text, parent) => {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
};

const tell = (fault) => {
  find("fault").textContent = fault;
  find("fault").hidden = !fault;
};

const draw = (place, sources) => {
  place.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
  place.replaceChildren();
  for (const [name, source] of sources) {
    const figure = make("figure", null, place), image = make("img", null, figure);
    image.alt = name ? "" : "The test picture";
    image.addEventListener("error", () => image.remove());  // a format that this browser does not show
    image.src = source;
    if (name) make("figcaption", name, figure);
  }
};

const list = () => files.map((each) => [each.name, URL.createObjectURL(each)]);
const locate = (number) => `/pictures/${number}?client=${encodeURIComponent(client.value)}`;

const show = () => {
  draw(shown, list());
  if (samples) samples.querySelectorAll("button").forEach((button) => {
    button.setAttribute("aria-pressed", String(sample !== null && Number(button.value) === sample.number));
  });
};

const take = (list) => {
  const all = Array.from(list);
  files = several ? all : all.slice(0, 1);
  sample = null;
  tell(all.length > files.length ? "This model takes one picture in a question: the first is taken." : "");
  show();
};

const choose = (chosen) => {
  sample = chosen;
  files = [];
  file.value = "";
  if (question) question.value = chosen.question;
  tell("");
  show();
};

const request = async (path, options) => {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: has it been stopped?");
  }
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
};

const offer = async () => {
  sample = null;
  show();
  if (!samples) return;
  const name = client.value, row = samples.querySelector(".samples");
  let found;
  try {
    found = (await request(`/samples?client=${encodeURIComponent(name)}`)).samples;
  } catch (error) {
    tell(error.message);
    return;
  }
  if (name !== client.value) return;
  row.replaceChildren();
  found.forEach((each, place) => {
    const button = make("button", null, row), image = make("img", null, button);
    button.type = "button";
    button.value = each.number;
    button.setAttribute("aria-pressed", "false");
    image.alt = chooses ? `Test picture ${place + 1}` : `Test picture ${place + 1}: ${each.question}`;
    image.src = locate(each.number);
    button.addEventListener("click", () => choose(each));
  });
  samples.hidden = !found.length;
};

const encode = (each) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.addEventListener("load", () => resolve(reader.result.slice(reader.result.indexOf(",") + 1)));
  reader.addEventListener("error", () => reject(new Error(`${each.name} cannot be read.`)));
  reader.readAsDataURL(each);
});

const write = (asked, found, right) => {
  draw(find("about"), asked.drawn);
  find("asked").textContent = asked.question || "Which class?";
  const told = right === null ? "" : ` · right answer: ${right}`;
  find("whose").textContent = `${asked.shown} · ${found.seconds.toFixed(1)} s${told}`;
  const cards = results.querySelector(".answers");
  cards.replaceChildren();
  for (const each of found.answers) {
    const card = make("article", null, cards);
    make("h3", each.model, card);
    make("p", each.answer || "(nothing)", card).dir = "auto";
    if (each.classes) {
      const list = make("ol", null, card);
      for (const one of each.classes) make("li", `${one.name} ${(100 * one.probability).toFixed(1)} %`, list);
    }
    if (each.model.startsWith("personal")) card.className = "own";
  }
  results.hidden = false;
  results.scrollIntoView({block: "nearest"});
};

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (busy) return;
  tell("");
  const text = question ? question.value.trim() : "";
  if (!files.length && sample === null) { tell("Choose a picture first."); file.focus(); return; }
  if (question && !text) { tell("Write a question first."); question.focus(); return; }
  if (files.reduce((sum, each) => sum + each.size, 0) > limit) {
    tell(`Pictures of more than ${limit / 2 ** 20} MiB are not taken.`);
    return;
  }
  busy = true;
  results.hidden = true;
  ask.setAttribute("aria-disabled", "true");
  find("status").textContent = "Asking … the first question compiles the models and takes longer.";
  // The right answer is to the sample's own question.
  const right = sample !== null && (chooses || text === sample.question) ? sample.answer : null;
  const drawn = sample === null ? list() : [["", locate(sample.number)]];
  try {
    const asked = {client: client.value, question: text, sample: sample && sample.number};
    asked.pictures = sample === null ? await Promise.all(files.map(encode)) : [];
    const headers = {"Content-Type": "application/json"};
    const found = await request("/ask", {method: "POST", headers, body: JSON.stringify(asked)});
    write({...asked, drawn, shown: client.selectedOptions[0].text}, found, right);
  } catch (error) {
    tell(error.message);
  } finally {
    busy = false;
    ask.removeAttribute("aria-disabled");
    find("status").textContent = "";
  }
});

file.addEventListener("change", () => take(file.files));
client.addEventListener("change", offer);
for (const name of ["dragenter", "dragover"]) document.addEventListener(name, (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  const dropped = Array.from(event.dataTransfer.files);
  if (dropped.length) { file.value = ""; take(dropped); }
});
document.addEventListener("paste", (event) => {
  const pasted = Array.from(event.clipboardData.files);
  if (pasted.length) { file.value = ""; take(pasted); }
});
offer();
