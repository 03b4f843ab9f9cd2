// The page of `vit22b serve`. Texts of users and of the model are only ever put on the
// page as text, and nothing is asked of any other server.
"use strict";

const at = (id) => document.getElementById(id);
const lines = []; // of the file that is downloaded
let file = null; // what was chosen last
let address = null; // the blob that is shown
let pressed = null;

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

async function look() {
  try {
    const said = await (await fetch("/health")).json();
    at("state").textContent = `${said.checkpoint}: ${said.status}, model ${said.model}`;
    at("caption").hidden = said.caption_prompt === null;
    at("ask").hidden = said.answer_prompt === null;
    at("attention").parentElement.hidden = !said.attention;
    at("attention").checked = said.attention;
  } catch {
    at("state").textContent = "the server does not answer";
  }
}

function take(chosen) {
  if (!chosen) return;
  problem("");
  file = chosen;
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(chosen);
  clear();
  at("shown").src = address;
  at("work").hidden = false;
}

async function send(place, question) {
  if (!file) return;
  const sent = file;
  const body = new FormData();
  body.append("image", sent);
  if (question !== null) body.append("question", question);
  body.append("attention", String(at("attention").checked));
  problem("");
  busy(true);
  try {
    const response = await fetch(place, { method: "POST", body });
    const said = await response.json();
    if (response.ok) show(sent, question, said);
    else problem(said.error);
  } catch {
    problem("the server does not answer; look at its terminal");
  } finally {
    busy(false);
  }
}

function busy(is) {
  for (const id of ["caption", "send"]) at(id).disabled = is;
}

function show(sent, question, said) {
  const { attention, ...line } = said;
  const asked = question === null ? {} : { question };
  lines.push({ index: lines.length, image_id: sent.name, ...asked, ...line });
  const item = document.createElement("li");
  const of = document.createElement("div");
  of.className = "of";
  of.textContent = `${sent.name}: ${line.prompt} (score ${line.score.toFixed(3)})`;
  const text = document.createElement("div");
  text.className = "text";
  if (attention && attention.words.length) {
    for (const word of attention.words) text.append(button(word, attention, sent));
  } else {
    text.textContent = line.prediction || "(no text)";
  }
  item.append(of, text);
  at("answers").prepend(item);
  at("results").hidden = false;
}

function button(word, attention, sent) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = "word";
  made.textContent = word.word;
  made.title = "show where the model looked";
  made.setAttribute("aria-pressed", "false");
  made.addEventListener("click", () => {
    const again = pressed === made;
    clear();
    if (again) return;
    if (sent !== file) {
      take(sent);
      at("shown").onload = () => draw(word.weights, attention);
    } else draw(word.weights, attention);
    pressed = made;
    made.setAttribute("aria-pressed", "true");
  });
  return made;
}

function clear() {
  if (pressed) pressed.setAttribute("aria-pressed", "false");
  pressed = null;
  at("shown").onload = null;
  const canvas = at("overlay");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

function draw(weights, { rows, columns, region }) {
  const image = at("shown");
  const canvas = at("overlay");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const pen = canvas.getContext("2d");
  const [left, top, width, height] = region;
  const least = Math.min(...weights);
  const range = Math.max(...weights) - least || 1;
  const wide = (width * canvas.width) / columns;
  const high = (height * canvas.height) / rows;
  weights.forEach((weight, number) => {
    const share = (weight - least) / range;
    pen.fillStyle = `rgb(${Math.round(255 * share)} ${Math.round(120 * share)} 0 / 0.6)`;
    const x = left * canvas.width + (number % columns) * wide;
    const y = top * canvas.height + Math.floor(number / columns) * high;
    pen.fillRect(x, y, wide, high);
  });
}

function download() {
  const text = lines.map((line) => JSON.stringify(line) + "\n").join("");
  const link = document.createElement("a");
  const blob = new Blob([text], { type: "application/jsonl" });
  link.href = URL.createObjectURL(blob);
  link.download = "answers.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

at("file").addEventListener("change", (event) => take(event.target.files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
at("caption").addEventListener("click", () => send("/v1/caption", null));
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send("/v1/answer", at("question").value);
});
at("download").addEventListener("click", download);
look();
