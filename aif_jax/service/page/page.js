"use strict";
// Asks /status.json every two seconds and draws it; sends the form to /v1/explain. Text only: nothing from elsewhere becomes HTML.

const LANES = [
  ["user side", "user", ["features", "user"]],
  ["interaction", "interaction", ["wait_user", "queue", "lookup", "score", "fetch"]],
  ["critical path", "whole", ["critical"]],
];
const SIDE = { ...Object.fromEntries(LANES.flatMap(([, side, stages]) => stages.map((stage) => [stage, side]))), total: "whole" };
const STAGES = Object.keys(SIDE);
const at = (id) => document.getElementById(id);

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = kind;
  return made;
}

function milliseconds(seconds) {
  return `${(1000 * seconds).toFixed(seconds < 0.01 ? 2 : 1)} ms`;
}

function age(seconds) {
  if (seconds === null) return "unknown";
  for (const [size, unit] of [[86400, "days"], [3600, "hours"], [60, "minutes"]]) {
    if (seconds >= 2 * size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.round(seconds)} s`;
}

function headers(more = {}) {
  const token = at("token").value;
  return token ? { ...more, authorization: `Bearer ${token}` } : more;
}

async function asked(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  const body = await response.json();
  if (!response.ok && body.error) throw new Error(body.error.message || body.error);
  return body;
}

function row(name, spans, figure) {
  const made = element("div", "", "row");
  const track = element("div", "", "track");
  for (const [start, width, kind, label = ""] of spans) {
    const span = element("div", width > 0.08 ? label : "", `span ${kind}`);
    span.title = label;
    const [from, to] = [start, start + width].map((share) => Math.max(0, Math.min(1, share)));
    span.style.left = `${100 * from}%`;
    span.style.width = `${100 * (to - from)}%`;
    track.append(span);
  }
  made.append(element("div", name), track, element("div", figure, "figure"));
  return made;
}

const answered = {};  // by version and folder: answers at the look before, and when that was

function rateOf(model) {
  const [now, name] = [performance.now(), `${model.version} ${model.folder}`];
  const [count, then] = answered[name] || [model.answered, now];
  answered[name] = [model.answered, now];
  return now > then ? (1000 * (model.answered - count)) / (now - then) : 0;
}

function drawModels(models, codes) {
  let rates = 0;
  const rows = models.map((model) => {
    const total = model.stages.total;
    const rate = rateOf(model);
    rates += rate;
    const line = element("tr");
    for (const [place, text] of [
      model.version.slice(0, 12), model.folder, model.share === null ? "kept" : `${(100 * model.share).toFixed(0)} %`,
      age(model.age), model.items.toLocaleString("en"), age(model.index_age) + position(model.index_positions),
      rate.toFixed(1), total ? `${milliseconds(total.p50)} / ${milliseconds(total.p99)}` : "–", String(model.degraded),
    ].entries()) {
      const cell = element("td", text);
      cell.dataset.label = at("models").tHead.rows[0].cells[place].textContent;  // for narrow windows
      line.append(cell);
    }
    return line;
  });
  at("models").tBodies[0].replaceChildren(...rows);
  const refused = Object.entries(codes).filter(([code]) => code !== "OK").map(([code, count]) => `${count} ${code}`);
  at("refused").textContent = refused.length ? `Without an answer: ${refused.join(", ")}.` : "";
  return rates;
}

function position(positions) {
  const listed = Object.entries(positions || {});
  if (!listed.length) return "";
  return listed.length === 1 ? `, at ${listed[0][1]}` : `, ${listed.length} partitions`;
}

function drawStages(models) {
  const [busiest] = models.filter((model) => model.stages.total).sort((a, b) => b.answered - a.answered);
  at("stages-note").textContent = busiest ? `Version ${busiest.version.slice(0, 12)}: dark to p50, light to p99.` : "No calls yet.";
  if (!busiest) return at("stages").replaceChildren();
  const longest = Math.max(...Object.values(busiest.stages).map((stage) => stage.p99), 1e-9);
  at("stages").replaceChildren(...STAGES.filter((name) => busiest.stages[name]).map((name) => {
    const { p50, p99 } = busiest.stages[name];
    const spans = [[0, p99 / longest, `${SIDE[name]} p99`], [0, p50 / longest, SIDE[name]]];
    return row(name, spans, `${milliseconds(p50)} / ${milliseconds(p99)}`);
  }));
}

function drawTimeline(spans) {
  const whole = spans.find((span) => span[0] === "total");
  if (!whole) return;
  const length = Math.max(whole[2], 1e-9);
  const lanes = LANES.map(([name, side, stages]) => {
    const own = spans.filter((span) => stages.includes(span[0]));
    const seconds = own.filter((span) => span[0] !== "wait_user").reduce((sum, span) => sum + span[2] - span[1], 0);
    const drawn = own.map(([stage, start, end]) => [
      start / length, (end - start) / length, stage === "wait_user" ? "wait" : side, `${stage} ${milliseconds(end - start)}`,
    ]);
    const none = spans.some((span) => span[0] === "wait_user") ? "late or failed" : "from the cache";
    return row(name, drawn, own.length ? milliseconds(seconds) : none);
  });
  const axis = element("div", "", "axis");
  axis.append(...[0, 0.25, 0.5, 0.75, 1].map((share) => element("span", milliseconds(share * length))));
  const last = element("div", "", "row");
  last.append(element("div"), axis, element("div"));
  at("timeline").replaceChildren(...lanes, last);
}

let tried = false;

async function refresh() {
  const state = at("state");
  try {
    const status = await asked("status.json");
    const calls = drawModels(status.models, status.codes).toFixed(1);
    state.textContent = status.ready ? `ready, ${calls} calls a second` : `not ready: ${status.reason}`;
    state.className = `state ${status.ready ? "good" : "bad"}`;
    at("problem").hidden = !status.problem;
    at("problem").textContent = status.problem ? `not published: ${status.problem}` : "";
    drawStages(status.models);
    if (!tried && status.timeline) drawTimeline(status.timeline.spans);
  } catch (error) {
    state.textContent = error.message;
    state.className = "state bad";
  }
}

function idOf(text, isText) {
  return !isText && /^-?\d+$/.test(text) ? String(BigInt(text)) : JSON.stringify(text);
}

// JSON as text, since numbers of JavaScript end at 2^53
function bodyOf(form) {
  const isText = form.get("text") === "on";
  const candidates = form.get("candidates").split(/[\s,]+/).filter(Boolean).map((text) => idOf(text, isText));
  const parts = [`"user":${idOf(form.get("user"), isText)}`, `"candidates":[${candidates}]`, `"k":${Number(form.get("k"))}`];
  for (const name of ["record", "events"]) {
    const text = form.get(name).trim() || (name === "events" && form.get("record").trim() ? "{}" : "");
    if (text) JSON.parse(text), parts.push(`"${name}":${text}`);
  }
  return `{${parts}}`;
}

function drawResult(answer) {
  const names = Object.keys(answer.contributions);
  const head = element("tr");
  const objectives = answer.objectives ? answer.objectives.map((name) => `logit of ${name}`) : ["logit"];
  for (const name of ["", "item", "score", ...objectives, ...names]) head.append(element("th", name));
  at("result").tHead.replaceChildren(head);
  const most = Math.max(...names.flatMap((name) => answer.contributions[name].map(Math.abs)), 1e-9);
  at("result").tBodies[0].replaceChildren(...answer.ids.map((id, place) => {
    const line = element("tr");
    const logits = [answer.logits[place]].flat().map((logit) => logit.toFixed(4));
    for (const text of [place + 1, id, answer.scores[place].toFixed(4), ...logits]) line.append(element("td", text));
    for (const name of names) {
      const value = answer.contributions[name][place];
      const cell = element("td");
      const part = element("span", "", value < 0 ? "part less" : "part");
      part.style.width = `${Math.round((60 * Math.abs(value)) / most)}px`;
      cell.append(part, value.toFixed(3));
      line.append(cell);
    }
    return line;
  }));
  at("result").hidden = false;
  at("parts").hidden = !names.length;
}

async function rank(event) {
  event.preventDefault();
  const form = new FormData(event.target);
  const said = at("answer");
  try {
    const options = { method: "POST", headers: { "content-type": "application/json" }, body: bodyOf(form) };
    const answer = await asked("v1/explain", options);
    const unknown = answer.unknown ? `, ${answer.unknown} not in the index` : "";
    const degraded = answer.degraded ? ` Degraded: ${answer.reason}.` : "";
    said.textContent = `Version ${answer.version.slice(0, 12)}, ${answer.candidates} candidates${unknown}, ${milliseconds(answer.stages.total)}.${degraded}`;
    said.className = "note";
    tried = true;
    drawTimeline(answer.spans);
    drawResult(answer);
  } catch (error) {
    said.textContent = error.message;
    said.className = "bad";
    at("result").hidden = at("parts").hidden = true;
  }
}

at("try").addEventListener("submit", rank);
at("token").addEventListener("change", refresh);
refresh();
setInterval(refresh, 2000);
