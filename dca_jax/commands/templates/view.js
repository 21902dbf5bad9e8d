"use strict";
// Whatever a policy, a reviewer or a user wrote becomes a text node, and nothing else.
const data = JSON.parse(document.getElementById("data").textContent);
const live = !data.episodes;
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}
const el = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);
const signed = (x, digits = 2) =>
  typeof x !== "number" ? String(x) : (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(digits);
const short = (x) =>
  typeof x !== "number"
    ? String(x)
    : Math.abs(x) >= 1e4 || (x && Math.abs(x) < 1e-3)
      ? x.toExponential(1)
      : String(+x.toPrecision(3));

// Where everything comes from: the server, or this file.

async function ask(what, query) {
  const answer = await fetch(what + "?" + new URLSearchParams(query));
  if (!answer.ok) throw new Error(what + ": " + answer.status);
  return answer.json();
}

function fits(e, q) {
  const words =
    q.problem && (/^\d+$/.test(q.problem) ? e.problem === q.problem : e.prompt.includes(q.problem));
  return (
    (!q.step || e.step === +q.step) &&
    (!q.problem || words) &&
    (!q.outcome || e.outcome === q.outcome) &&
    (!q.review || e.review === q.review) &&
    (!q.role || e.roles.includes("," + q.role + ",")) &&
    (!q.least || e.length >= +q.least)
  );
}

async function find(query) {
  if (live) return ask("episodes", query);
  const key = query.sort,
    sign = query.down === "1" ? -1 : 1;
  const value = (e) => (key === "problem" ? +e.problem : e[key]);
  const found = data.episodes.filter((e) => fits(e, query));
  found.sort((a, b) => (value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0));
  return {
    total: found.length,
    rows: found.slice(query.page * data.page, (+query.page + 1) * data.page),
  };
}

async function read(run, step, problem, sample) {
  if (live) return ask("episode", { run, step, problem, sample });
  const group = data.episodes.filter((e) => e.step === +step && e.problem === problem);
  return { episode: group.find((e) => e.sample === +sample) || null, group, others: [] };
}

// Curves.

const CHARTS = [
  ["Accuracy", ["train/accuracy", "eval/sampled", "eval/greedy"]],
  ["Length (tokens)", ["train/length"]],
  ["Repeats, checks, needless (steps an answer)", ["train/repeats", "train/checks", "train/needless"]],
  [
    "Truncated, and groups that fare differently (share)",
    ["train/truncated", "train/mixed_groups"],
  ],
  ["Entropy and KL to the start (nats)", ["learner/entropy", "learner/kl"]],
  ["Credit moved (share)", ["credit/moved"]],
  ["Reviews asked for and usable (share)", ["review/asked", "review/ok"]],
  [
    "Tokens of reviews, a step",
    ["review/prompt_tokens", "review/output_tokens", "review/thought_tokens"],
  ],
  ["Dollars for reviews", ["review/dollars_spent"]],
  ["Effect of steps that were checked", ["spot/effect"]],
  ["Age of answers (steps)", ["rollout/age", "rollout/age_max"]],
  ["Seconds a step", ["seconds/sample", "seconds/review", "seconds/update", "seconds/spot"]],
];
const SMOOTH = 5;
const metrics = data.metrics || data.runs.map(() => []);

function series(key) {
  return metrics
    .map((rows, run) => {
      const own = rows.filter((row) => key in row).map((row) => [row.step, row[key]]);
      const mean = (_, i) => {
        const part = own.slice(Math.max(0, i + 1 - SMOOTH), i + 1);
        return [own[i][0], part.reduce((sum, [, y]) => sum + y, 0) / part.length];
      };
      const every = Math.ceil(own.length / 600);
      const points = (key.startsWith("train/") ? own.map(mean) : own).filter(
        (_, i) => i % every === 0 || i === own.length - 1,
      );
      return {
        name: key.split("/").slice(1).join("/") + (run ? ", " + data.runs[run].name : ""),
        points,
        run,
      };
    })
    .filter((curve) => curve.points.length);
}

function chart(title, curves, unit) {
  const [w, h, left, bottom] = [360, 190, 44, 22];
  const xs = curves.flatMap((c) => c.points.map((p) => p[0])),
    ys = curves.flatMap((c) => c.points.map((p) => p[1]));
  const range = (v) => {
    const a = v.reduce((m, x) => Math.min(m, x)),
      b = v.reduce((m, x) => Math.max(m, x));
    return [a, b];
  };
  // Where all are nearly the same, their noise would fill the drawing.
  const wide = ([a, b], least) => {
    const more = Math.max(0, least - (b - a)) / 2;
    return [a - more, b + more];
  };
  const [a, b] = range(ys);
  const [x0, x1] = wide(range(xs), 1),
    [y0, y1] =
      title === "Accuracy" || (!a && !b)
        ? [0, 1]
        : wide([a, b], Math.max(Math.abs(a), Math.abs(b)) / 50);
  const X = (x) => left + ((x - x0) / (x1 - x0)) * (w - left - 8),
    Y = (y) => h - bottom - ((y - y0) / (y1 - y0)) * (h - bottom - 8);
  const told = curves
    .map(
      (c) =>
        `${c.name} from ${short(c.points[0][1])} to ${short(c.points[c.points.length - 1][1])}`,
    )
    .join("; ");
  const drawing = svg("svg", {
    viewBox: `0 0 ${w} ${h}`,
    role: "img",
    "aria-label": `${title}, by ${unit}: ${told}`,
  });
  for (const part of [0, 0.5, 1]) {
    const y = y0 + part * (y1 - y0),
      x = x0 + part * (x1 - x0);
    drawing.append(svg("line", { class: "grid", x1: left, x2: w - 8, y1: Y(y), y2: Y(y) }));
    drawing.append(svg("text", { x: left - 4, y: Y(y) + 4, "text-anchor": "end" }, short(y)));
    drawing.append(
      svg(
        "text",
        { x: X(x), y: h - 5, "text-anchor": part === 1 ? "end" : part ? "middle" : "start" },
        short(Math.round(x)),
      ),
    );
  }
  const names = [];
  curves.forEach((c, i) => {
    const colour = "k" + (i % 4) + (c.run ? " other" : "");
    const line = c.points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`);
    drawing.append(svg("polyline", { class: "curve " + colour, points: line.join(" ") }));
    if (line.length < 12)
      for (const [x, y] of c.points)
        drawing.append(
          svg("circle", { class: "k" + (i % 4), fill: "currentColor", cx: X(x), cy: Y(y), r: 2.2 }),
        );
    names.push(
      el("span", { class: "k" + (i % 4) }, (c.run ? "\u254c\u00a0" : "\u2501\u00a0") + c.name),
      " ",
    );
  });
  return el("figure", {}, el("figcaption", {}, el("b", {}, title + " "), ...names), drawing);
}

function draw() {
  const made = CHARTS.map(([title, keys]) => [title, keys.flatMap(series)]).filter(
    ([, curves]) => curves.length,
  );
  $("charts").replaceChildren(...made.map(([title, curves]) => chart(title, curves, "step")));
  const names = [...new Set(metrics.flat().flatMap(Object.keys))]
    .filter((key) => key !== "step")
    .sort();
  const chosen = $("metric").value;
  $("metric").replaceChildren(
    el("option", { value: "" }, "none"),
    ...names.map((name) => el("option", {}, name)),
  );
  $("metric").value = chosen;
  $("more").replaceChildren(...(chosen ? [chart(chosen, series(chosen), "step")] : []));
}

// The table.

const COLUMNS = [
  ["step", "Step"],
  ["problem", "Problem"],
  ["sample", "Sample"],
  ["outcome", "Outcome"],
  ["reward", "Reward"],
  ["advantage", "Advantage"],
  ["length", "Tokens"],
  ["steps", "Steps"],
  ["review", "Review"],
  ["roles", "Roles"],
];
const order = { sort: "step", down: "0" };
const form = $("filter");
const run = () => (live ? form.elements.run.value || "0" : "0");
let page = 0,
  asked = 0;

function query() {
  return Object.fromEntries(
    [...new FormData(form)]
      .map(([key, value]) => [key, value.trim()])
      .filter(([key, value]) => value && (live || key !== "run")),
  );
}

function header() {
  const cells = COLUMNS.map(([key, name]) => {
    const own = order.sort === key,
      arrow = own ? (order.down === "1" ? " \u2193" : " \u2191") : "";
    const button = el("button", { type: "button" }, name + arrow);
    button.addEventListener("click", () => {
      order.down = own && order.down === "0" ? "1" : "0";
      order.sort = key;
      page = 0;
      show().then(() =>
        $("episodes").querySelectorAll("th button")[COLUMNS.findIndex(([k]) => k === key)].focus(),
      );
    });
    return el(
      "th",
      {
        scope: "col",
        "aria-sort": own ? (order.down === "1" ? "descending" : "ascending") : "none",
      },
      button,
    );
  });
  $("episodes").tHead.replaceChildren(
    el(
      "tr",
      {},
      el("th", { scope: "col" }, el("span", { class: "hidden" }, "Open")),
      ...cells,
      el("th", { scope: "col" }, "Prompt"),
    ),
  );
}

function row(e) {
  const id = `${e.step}/${e.problem}/${e.sample}`;
  const button = el("button", { type: "button", "aria-label": "Open episode " + id }, "Open");
  button.addEventListener("click", () => {
    if (location.hash === "#" + id) open();
    else location.hash = id;
  });
  const shown = {
    ...e,
    review: data.runs[run()].reviewer ? e.review : "no reviewer",
    reward: short(e.reward),
    advantage: signed(e.advantage),
    roles: e.roles.split(",").filter(Boolean).join(", "),
  };
  return el(
    "tr",
    {},
    el("td", {}, button),
    ...COLUMNS.map(([key]) => el("td", { class: "of-" + key }, shown[key])),
    el("td", { class: "prompt" }, el("div", { class: "said" }, e.prompt.slice(0, 200))),
  );
}

async function show() {
  const number = ++asked;
  if (!form.checkValidity()) return;
  const found = await find({ ...query(), ...order, page }).catch((error) => ({
    total: 0,
    rows: [],
    error,
  }));
  if (number !== asked) return; // A later question has been asked meanwhile.
  const pages = Math.max(1, Math.ceil(found.total / data.page));
  header();
  $("episodes").tBodies[0].replaceChildren(...found.rows.map(row));
  $("count").textContent = found.error
    ? `The server does not answer (${found.error.message}).`
    : `${found.total.toLocaleString("en")} episodes, ` +
      `page ${page + 1} of ${pages.toLocaleString("en")}`;
  $("back").disabled = page === 0;
  $("on").disabled = page + 1 >= pages;
}

// An episode.

const BOUNDS = [0.05, 0.2, 0.5, 1.0];
const shade = (credit) => {
  const n = BOUNDS.filter((bound) => Math.abs(credit) >= bound).length;
  return n ? (credit < 0 ? "m" : "p") + n : "p0";
};
const told = (text) => {
  $("token").textContent = text;
};

// Why nobody was asked about an answer, where nobody was; `group` are the answers to its problem.
function unread(e, group, of) {
  const { reviewer, idle } = data.runs[of];
  if (!reviewer) return ["This run has no reviewer, so no step has a role."];
  if (e.review !== "skipped") return [];
  if (!e.trained) return ["skipped: the answer was left out of training"];
  if (idle && group.every((o) => o.reward === e.reward))
    return ["skipped: all answers of the group fared alike, so no review could matter"];
  return ["skipped: no review could matter, or not all are asked for (reviewer.sample_frac)"];
}

function step(span, full, unread) {
  const role = span.role ? `${span.role} \u00d7 ${short(span.weight)}` : unread;
  const parts = [`${role} ${signed(span.credit)}`];
  if ("value" in span) parts.push("value before " + short(span.value));
  if ("effect" in span) parts.push("measured effect " + signed(span.effect));
  if (span.reason) parts.push("reason: " + span.reason);
  const box = el("div", { class: "step said " + shade(span.credit), dir: "auto" });
  if (full && span.tokens) {
    for (const [text, credit] of span.tokens) {
      const token = el("span", { class: "token" }, text);
      token.addEventListener("pointerenter", () =>
        told(`\u201c${text}\u201d advantage ${signed(credit, 3)}`),
      );
      box.append(token);
    }
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `${span.text} ${parts[0]}`.slice(0, 300));
    box.addEventListener("focus", () =>
      told(
        span.tokens
          .slice(0, 60)
          .map(([text, credit]) => `${text} ${signed(credit, 3)}`)
          .join(" \u00b7 "),
      ),
    );
    box.addEventListener("pointerleave", () => told(""));
    box.addEventListener("blur", () => told(""));
  } else box.append(span.text);
  box.append(el("small", {}, parts.join("; ")));
  return box;
}

// An answer of run `of`; in `full` where its group is given.
function answer(e, of, group) {
  const full = Boolean(group),
    status = data.runs[of].reviewer ? `no review (${e.review})` : "no reviewer";
  const spans = e.spans.map((span) =>
    "given" in span
      ? el("div", { class: "given said", dir: "auto" }, span.given)
      : step(span, full, status),
  );
  const by = e.model ? `, reviewed by ${e.model}` : "";
  const more = Object.entries(e.parts)
    .map(([name, x]) => `, ${name} ${short(x)}`)
    .join("");
  const wanted = e.outcome === "right" ? "" : `, the answer is ${e.answer}`;
  const out = e.trained ? "" : ", left out of training";
  const text = `${e.outcome}${wanted}; advantage ${signed(e.advantage, 3)}${more}${by}${out}`;
  const id = `${e.step}/${e.problem}/${e.sample}`;
  return el(
    "div",
    { class: "answer", role: "group", "aria-label": `Answer ${id}, ${e.outcome}`, tabindex: 0 },
    el("div", { class: "note said" }, `${id}: ${text}`),
    ...(full ? unread(e, group, of) : []).map((said) => el("p", { class: "why" }, said)),
    ...(spans.length ? spans : ["(no step)"]),
  );
}

function along(e) {
  const steps = e.spans.filter((span) => !("given" in span));
  const of = (name, key) => ({
    name,
    run: 0,
    points: steps.map((s, k) => [k + 1, s[key]]).filter(([, y]) => y !== undefined),
  });
  const curves = [
    of("value before the step", "value"),
    of("measured effect", "effect"),
    of("credit", "credit"),
  ].filter((c) => c.points.length);
  return curves.length > 1 ? [chart("Along the answer", curves, "number of the step")] : [];
}

async function open(focus = true) {
  const hash = location.hash,
    match = /^#(\d+)\/(\d+)\/(\d+)$/.exec(hash),
    place = $("episode");
  place.hidden = !match;
  told("");
  if (!match) return;
  const own = run();
  const found = await read(own, ...match.slice(1)).catch(() => ({
    episode: null,
    group: [],
    others: [],
  }));
  if (hash !== location.hash) return; // Another one has been opened meanwhile.
  const e = found.episode,
    close = el("button", { type: "button" }, "Close");
  close.addEventListener("click", () => {
    location.hash = "";
  });
  const title = el("h2", { tabindex: -1 }, "Episode " + match.slice(1).join("/"));
  const list = (name, own, of) =>
    own.length
      ? [el("h3", {}, name), el("div", { class: "answers" }, ...own.map((o) => answer(o, of)))]
      : [];
  const rest = e
    ? [
        el(
          "div",
          {
            class: "prompt-text said",
            dir: "auto",
            tabindex: 0,
            role: "group",
            "aria-label": "Prompt",
          },
          e.prompt,
        ),
        answer(e, own, found.group),
        ...along(e),
        ...list(
          "The group's other answers",
          found.group.filter((o) => o.sample !== e.sample),
          own,
        ),
        ...list("The other run on the same problem", found.others, 1 - own),
      ]
    : [el("p", {}, "There is no such episode here.")];
  place.replaceChildren(title, close, ...rest);
  if (focus) title.focus();
}

// Opens, once, an episode in which credit can be seen: of the first that were reviewed the one that
// fared most unlike its group, and where none was, of all.
let begun = location.hash.length > 1;
async function begin() {
  const first = { page: 0, ...(live ? { run: run() } : {}) };
  const size = (e) => Math.abs(e.advantage);
  for (const wanted of [
    { ...first, review: "ok", sort: "step", down: "0" },
    { ...first, sort: "advantage", down: "1" },
  ]) {
    const { rows } = await find(wanted).catch(() => ({ rows: [] }));
    if (begun) return;
    const [best] = rows.filter(size).sort((a, b) => size(b) - size(a));
    if (best) {
      begun = true;
      history.replaceState(null, "", `#${best.step}/${best.problem}/${best.sample}`);
      await open(false);
      return;
    }
  }
}

// What happens when.

let typing;
function changed(wait) {
  page = 0;
  clearTimeout(typing);
  typing = setTimeout(show, wait);
}
form.addEventListener("input", (event) => changed(event.target.tagName === "SELECT" ? 0 : 100));
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => changed(0));
form.elements.run.addEventListener("change", () => {
  location.hash = "";
});
$("back").addEventListener("click", () => {
  page -= 1;
  show();
});
$("on").addEventListener("click", () => {
  page += 1;
  show();
});
$("metric").addEventListener("change", draw);
addEventListener("hashchange", () => {
  begun = true;
  open();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && location.hash.length > 1) location.hash = "";
});

function statuses(own) {
  if (!data.runs.some((one) => one.reviewer)) return;
  const there = new Set([...form.elements.review.options].map((option) => option.value));
  for (const status of own)
    if (!there.has(status)) form.elements.review.append(el("option", {}, status));
}

let known = 0;
async function follow() {
  let more = false,
    episodes = 0;
  for (let run = 0; run < metrics.length; run += 1) {
    const rows = metrics[run],
      since = rows.length ? rows[rows.length - 1].step : -1;
    const came = await ask("metrics", { run, since }).catch(() => ({
      rows: [],
      statuses: [],
      episodes: 0,
    }));
    rows.push(...came.rows);
    more = more || came.rows.length > 0;
    episodes += came.episodes;
    statuses(came.statuses);
  }
  if (more) draw();
  if (episodes && episodes !== known && page === 0 && !$("list").contains(document.activeElement)) {
    known = episodes;
    await show();
  }
  if (episodes && !begun) await begin();
  setTimeout(follow, 2000);
}

form.elements.role.append(...data.roles.map((role) => el("option", {}, role)));
form.elements.run.append(...data.runs.map(({ name }, i) => el("option", { value: i }, name)));
$("runs").hidden = data.runs.length < 2;
if (!live) statuses(new Set(data.episodes.map((e) => e.review)));
draw();
show();
open();
if (live) follow();
else if (!begun) begin();
