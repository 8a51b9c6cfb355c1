"use strict";

// The page asks the same routes as every other client; nothing here is private to it.
const $ = (id) => document.getElementById(id);
const PREVIEWS = 3;
let running = null;
let language = "curl";

function settings() {
  const body = { prompt: $("prompt").value };
  for (const id of ["n", "steps", "guidance", "seed"]) {
    const field = $(id);
    if (field.value !== "") body[field.name] = Number(field.value);
  }
  if ($("negative").value) body.negative_prompt = $("negative").value;
  if ($("sampler").value !== "euler") body.sampler = $("sampler").value;
  return body;
}

function startPicture() {
  return $("image").files[0] || null;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function figure() {
  const made = document.createElement("figure");
  made.className = "making";
  const frame = document.createElement("div");
  frame.className = "frame";
  const image = document.createElement("img");
  image.alt = `${$("prompt").value} (being made)`;
  image.hidden = true;
  frame.append(image);
  const caption = document.createElement("figcaption");
  const bar = document.createElement("progress");
  bar.setAttribute("aria-label", "being made");
  caption.append(bar);
  made.append(frame, caption);
  $("gallery").prepend(made);
  $("empty").hidden = true;
  return made;
}

function show(made, event) {
  const image = made.querySelector("img");
  image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  image.hidden = false;
}

function finish(made, event, prompt) {
  show(made, event);
  made.className = "";
  made.querySelector("img").alt = prompt;
  const caption = made.querySelector("figcaption");
  caption.textContent = `seed ${event.seed} `;
  const link = document.createElement("a");
  link.href = made.querySelector("img").src;
  link.download = `darkroom-${event.seed}.${event.output_format}`;
  link.textContent = "save";
  link.setAttribute("aria-label", `save the picture of seed ${event.seed}`);
  const again = document.createElement("button");
  again.type = "button";
  again.textContent = "use seed";
  again.setAttribute("aria-label", `use seed ${event.seed}`);
  again.addEventListener("click", () => {
    $("seed").value = event.seed;
    document.querySelector("details").open = true;
    program();
  });
  caption.append(link, " ", again);
}

// Server-sent events over fetch: EventSource can only GET.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const lines = buffer.slice(0, end).split("\n");
      buffer = buffer.slice(end + 2);
      const field = (name) => (lines.find((line) => line.startsWith(`${name}: `)) || "").slice(name.length + 2);
      yield { name: field("event"), data: JSON.parse(field("data")) };
    }
  }
}

function ask(body, signal) {
  const picture = startPicture();
  if (!picture) {
    const headers = { "content-type": "application/json" };
    return fetch("v1/images/generations", { method: "POST", headers, body: JSON.stringify(body), signal });
  }
  const form = new FormData();
  for (const [name, value] of Object.entries({ ...body, strength: $("strength").value })) form.append(name, value);
  form.append("image", picture);
  return fetch("v1/images/edits", { method: "POST", body: form, signal });
}

async function make() {
  if (running || !$("form").reportValidity()) return;
  const body = settings();
  running = new AbortController();
  $("make").disabled = true;
  $("stop").disabled = false;
  say("Asking…");
  const figures = new Map();
  const started = performance.now();
  try {
    const response = await ask({ ...body, stream: true, partial_images: PREVIEWS }, running.signal);
    if (!response.ok) throw new Error(await refusal(response));
    for (let i = (body.n || 1) - 1; i >= 0; i--) figures.set(i, figure());
    say("Denoising…");
    for await (const { name, data } of events(response)) {
      if (name === "error") throw new Error(data.error.message);
      const made = figures.get(data.image_index);
      if (name.endsWith(".completed")) {
        finish(made, data, body.prompt);
        figures.delete(data.image_index);
      } else {
        show(made, data);
        made.querySelector("progress").value = (data.partial_image_index + 1) / (PREVIEWS + 1);
      }
    }
    if (figures.size) throw new Error("The server ended the stream before all pictures were made.");
    say(`Done in ${((performance.now() - started) / 1000).toFixed(1)} s.`);
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    for (const made of figures.values()) made.remove();
    $("empty").hidden = $("gallery").childElementCount > 0;
    running = null;
    $("make").disabled = false;
    $("stop").disabled = true;
  }
}

async function refusal(response) {
  const after = response.headers.get("retry-after");
  const later = after ? `\nAsk again in ${after} s.` : "";
  try {
    return (await response.json()).error.message + later;
  } catch {
    return `The server answered ${response.status}.${later}`;
  }
}

function program() {
  const body = settings();
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  $("code").textContent = language === "curl" ? curl(base, body) : python(base, body);
}

function curl(base, body) {
  const quoted = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;
  if (!startPicture()) {
    return `curl -s ${base}/v1/images/generations -H 'content-type: application/json' \\\n` +
      `  -d ${quoted(JSON.stringify(body))} | python3 -c "import base64, json, sys; ` +
      `open('out.png', 'wb').write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))"`;
  }
  // --form-string: -F would send a file where a prompt begins with @ or <
  const fields = Object.entries({ ...body, strength: $("strength").value });
  return `curl -s ${base}/v1/images/edits \\\n  -F image=@picture.png \\\n` +
    fields.map(([name, value]) => `  --form-string ${quoted(`${name}=${value}`)}`).join(" \\\n");
}

function python(base, body) {
  const { prompt, n, ...extra } = body;
  const picture = startPicture();
  if (picture) extra.strength = Number($("strength").value);
  const call = picture ? "edit" : "generate";
  return `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}/v1", api_key="none")\n` +
    `answer = client.images.${call}(\n` + (picture ? `    image=open("picture.png", "rb"),\n` : "") +
    `    prompt=${JSON.stringify(prompt)},\n    n=${n || 1},\n    extra_body=${JSON.stringify(extra)},\n)\n` +
    `print(answer.data[0].seed)`;
}

function choose(name) {
  language = name;
  for (const each of ["curl", "python"]) {
    const tab = $(`tab-${each}`);
    tab.setAttribute("aria-selected", String(each === name));
    tab.tabIndex = each === name ? 0 : -1;
  }
  $("code").setAttribute("aria-labelledby", `tab-${name}`);
  program();
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("code").textContent);
    say("Copied.");
  } catch {
    getSelection().selectAllChildren($("code"));
    say("Selected: copy it with Ctrl+C.");
  }
}

async function about() {
  try {
    const { data } = await (await fetch("v1/models")).json();
    const [model] = data;
    const version = model.version === null ? "" : `, version ${model.version}`;
    $("model").textContent = `${model.id}${version} · ${model.resolution}×${model.resolution} pixels`;
  } catch {
    $("model").textContent = "The server does not answer.";
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); make(); });
$("form").addEventListener("input", () => { $("strength-value").textContent = $("strength").value; program(); });
$("stop").addEventListener("click", () => running?.abort());
$("copy").addEventListener("click", copy);
for (const name of ["curl", "python"]) {
  $(`tab-${name}`).addEventListener("click", () => choose(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = name === "curl" ? "python" : "curl";
    choose(other);
    $(`tab-${other}`).focus();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); make(); }
  if (event.key === "Escape") running?.abort();
});
about();
program();
