"use strict";
// The state of the page is the fragment of its address (#metric=top-1&order=worst&show=low&search=cat&page=2), so that
// a view can be kept and sent. Texts of samples come into the page as text nodes alone.
const PER_PAGE = 48;
const { samples, images, metrics } = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function make(tag, text, into) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (into) into.append(made);
  return made;
}

samples.forEach((sample, place) => {
  sample.place = place;
  sample.searched = [sample.id, ...Object.values(sample.fields).map(shown)].join("\n").toLowerCase();
});

// What few different values describe, such as a kind or a language, can be chosen from.
function facetsOf() {
  const values = new Map();
  for (const { fields } of samples) {
    for (const [name, value] of Object.entries(fields)) {
      if (!values.has(name)) values.set(name, new Map());
      const counts = values.get(name);
      counts.set(shown(value), (counts.get(shown(value)) ?? 0) + 1);
    }
  }
  return [...values].filter(([, counts]) => counts.size > 1 && counts.size <= 30 && counts.size <= samples.length / 2);
}

const facets = facetsOf();
const controls = ["metric", "order", "show", "search"];

function addOption(select, value, text) {
  make("option", text, select).value = value;
}

function build() {
  for (const metric of metrics) addOption(element("metric"), metric, metric);
  for (const [name, counts] of facets) {
    const label = make("label", `${name} `, element("facets"));
    const select = make("select", undefined, label);
    select.id = `field:${name}`;
    addOption(select, "", "all");
    for (const [value, count] of [...counts].sort()) addOption(select, value, `${value} (${count})`);
    controls.push(select.id);
  }
  for (const id of controls) {
    element(id).addEventListener(id === "search" ? "input" : "change", () => go({ [id]: element(id).value, page: "" }));
  }
  element("back").addEventListener("click", () => go({ page: String(page() - 1) }));
  element("next").addEventListener("click", () => go({ page: String(page() + 1) }));
  addEventListener("hashchange", render);
}

const state = () => new URLSearchParams(location.hash.slice(1));
const page = () => Math.max(1, Number.parseInt(state().get("page"), 10) || 1);

function go(changes) {
  const next = state();
  for (const [name, value] of Object.entries(changes)) {
    if (value) next.set(name, value);
    else next.delete(name);
  }
  history.replaceState(null, "", `#${next}`);
  render();
}

function chosen() {
  const wanted = state();
  const metric = metrics.includes(wanted.get("metric")) ? wanted.get("metric") : metrics[0];
  const search = (wanted.get("search") ?? "").toLowerCase();
  const scored = metric === undefined ? samples : samples.filter((sample) => metric in sample.scores);
  const score = (sample) => sample.scores[metric];
  const isBinary = scored.every((sample) => score(sample) === 0 || score(sample) === 1);
  const mean = scored.reduce((sum, sample) => sum + score(sample), 0) / Math.max(1, scored.length);
  const isHigh = (sample) => (isBinary ? score(sample) === 1 : score(sample) >= mean);
  let found = scored.filter((sample) => sample.searched.includes(search));
  for (const [name] of facets) {
    const value = wanted.get(`field:${name}`);
    if (value) found = found.filter(({ fields }) => name in fields && shown(fields[name]) === value);
  }
  if (wanted.get("show") === "low") found = found.filter((sample) => !isHigh(sample));
  if (wanted.get("show") === "high") found = found.filter(isHigh);
  const order = wanted.get("order") ?? "worst";
  const sign = { worst: 1, best: -1 }[order] ?? 0;
  found.sort((a, b) => sign * (score(a) - score(b)) || a.place - b.place);
  return { metric, found, isHigh, isBinary };
}

function card(sample, metric, isHigh) {
  const article = make("article");
  article.className = metric === undefined ? "" : isHigh(sample) ? "good" : "bad";
  for (const source of [images[sample.image], sample.map]) {
    if (!source) continue;
    const image = make("img", undefined, article);
    image.loading = "lazy";
    image.alt = "";
    image.src = source;
  }
  make("h2", sample.id, article);
  const list = make("dl", undefined, article);
  for (const [name, value] of Object.entries(sample.fields)) {
    make("dt", name, list);
    make("dd", shown(value), list).dir = "auto";
  }
  const scores = make("ul", undefined, article);
  for (const [name, value] of Object.entries(sample.scores)) {
    const item = make("li", `${name} ${Number.isInteger(value) ? value : value.toFixed(3)}`, scores);
    if (name === metric) item.className = "chosen";
  }
  return article;
}

function render() {
  const wanted = state();
  const { metric, found, isHigh, isBinary } = chosen();
  const last = Math.max(1, Math.ceil(found.length / PER_PAGE));
  const current = Math.min(page(), last);
  const [low, high] = isBinary ? ["wrong", "right"] : ["below the mean", "the mean and above"];
  element("show").options[1].textContent = low;
  element("show").options[2].textContent = high;
  for (const id of controls) {
    if (document.activeElement !== element(id)) element(id).value = wanted.get(id) ?? element(id).options?.[0]?.value ?? "";
  }
  element("position").textContent = `${found.length} of ${samples.length} samples, page ${current} of ${last}`;
  element("back").disabled = current === 1;
  element("next").disabled = current === last;
  const first = (current - 1) * PER_PAGE;
  element("cards").replaceChildren(...found.slice(first, first + PER_PAGE).map((one) => card(one, metric, isHigh)));
}

build();
render();
