"use strict";
// Everything from a run enters the page as text nodes and attributes, never as HTML.

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(
    ...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))),
  );
  return element;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const clamp = (x) => Math.min(1, Math.max(0, x));
const show = (x, digits = 4) =>
  x === null || x === undefined ? "–" : typeof x === "number" ? String(Number(x.toPrecision(digits))) : String(x);
const colourOf = (colour) => (colour === "#000000" ? "var(--ink)" : colour); // black would be lost on a dark page
const DASHES = { solid: null, dashed: "7 4", dashdot: "8 3 2 3", dotted: "2 3" };

// ---- curves ----

const WIDTH = 320;
const HEIGHT = 150;
const LEFT = 42;
const RIGHT = 6;
const TOP = 8;
const BOTTOM = 20;
const charts = []; // functions of a step: move the cursor there and show the values

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9); i++)
    found.push(Number((i * step).toPrecision(12)));
  return found;
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

function extent(panels) {
  let [low, high] = [Infinity, -Infinity];
  for (const { curves } of panels)
    for (const curve of curves)
      for (const list of [curve.low, curve.high, ...curve.seeds.map((seed) => seed[1])])
        for (const value of list) if (value !== null) [low, high] = [Math.min(low, value), Math.max(high, value)];
  return [low, high];
}

function chart(panel, groups, [low, high], [first, last], bare, onStep, onPick) {
  const percent = panel.unit.startsWith("%");
  const scale = percent ? 100 : 1;
  [low, high] = [percent ? 0 : low * scale, high * scale];
  const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  [low, high] = [percent ? 0 : low - room, high + room];
  const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = draw("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    class: "chart",
    tabindex: 0,
    role: "slider",
    "aria-label": `${panel.title}, ${panel.unit}; step`,
    "aria-valuemin": first,
    "aria-valuemax": last,
  });
  for (const value of ticks(low, high, 4))
    svg.append(
      draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      draw("text", { x: LEFT - 6, y: y(value) + 3, "text-anchor": "end" }, value),
    );
  for (const value of ticks(first, last, 5))
    if (Number.isInteger(value))
      svg.append(draw("text", { x: x(value), y: HEIGHT - 6, "text-anchor": "middle" }, value));
  const cursor = svg.appendChild(draw("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM }));
  const dots = svg.appendChild(draw("g"));
  const rows = make("table", { class: "readout", "aria-hidden": "true" });
  const lines = panel.curves.map((curve) => {
    const { colour, dash, label } = groups[curve.group];
    const stroke = colourOf(colour);
    const points = (steps, values) => steps.map((step, i) => [x(step), y(scale * values[i])]);
    const edge = [...points(curve.steps, curve.high), ...points(curve.steps, curve.low).reverse()];
    if (curve.spread) svg.append(draw("path", { d: path(edge) + "Z", style: `fill: ${stroke}; fill-opacity: .14` }));
    for (const [steps, values] of curve.seeds)
      svg.append(
        draw("path", {
          d: path(points(steps, values)),
          style: `fill: none; stroke: ${stroke}; stroke-width: .6; stroke-opacity: .55`,
        }),
      );
    svg.append(
      draw("path", {
        d: path(points(curve.steps, curve.mean)),
        "stroke-dasharray": DASHES[dash],
        style: `fill: none; stroke: ${stroke}; stroke-width: 1.7`,
      }),
    );
    const dot = dots.appendChild(draw("circle", { r: 3, style: `fill: ${stroke}` }));
    const value = make("b");
    const range = make("small");
    rows.append(make("tr", {}, make("td", {}, label), make("td", {}, value), make("td", {}, range)));
    return { curve, label, dot, value, range };
  });
  svg.append(dots);
  const steps = [...new Set(panel.curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);

  function move(step) {
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    const said = lines.map(({ curve, label, dot, value, range }) => {
      const at = curve.steps.findLastIndex((known) => known <= step); // the newest value there was at this step
      dot.setAttribute("visibility", at < 0 ? "hidden" : "visible");
      if (at < 0) return (value.textContent = range.textContent = "");
      dot.setAttribute("cx", x(curve.steps[at]));
      dot.setAttribute("cy", y(scale * curve.mean[at]));
      value.textContent = show(scale * curve.mean[at]) + (percent ? " %" : "");
      const spread = {
        seeds: `${show(scale * curve.low[at], 3)} to ${show(scale * curve.high[at], 3)}`,
        stderr: `± ${show(scale * (curve.high[at] - curve.mean[at]), 2)}`,
        "": "",
      };
      range.textContent = [spread[curve.spread], curve.steps[at] === step ? "" : `at step ${curve.steps[at]}`]
        .join(" ")
        .trim();
      return `${label} ${value.textContent} ${range.textContent}`;
    });
    svg.setAttribute("aria-valuenow", step);
    svg.setAttribute("aria-valuetext", `step ${step}: ${said.filter(Boolean).join("; ")}`);
  }
  let now = last;
  const go = (step) => onStep((now = step));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const left = ((event.clientX - box.left) / box.width) * WIDTH;
    go(steps.reduce((best, step) => (Math.abs(x(step) - left) < Math.abs(x(best) - left) ? step : best)));
  });
  svg.addEventListener("click", () => onPick(now));
  svg.addEventListener("keydown", (event) => {
    const at = steps.findLastIndex((step) => step <= Number(svg.getAttribute("aria-valuenow")));
    const to = {
      ArrowLeft: at - 1,
      ArrowDown: at - 1,
      ArrowRight: at + 1,
      ArrowUp: at + 1,
      Home: 0,
      End: steps.length - 1,
    }[event.key];
    if (event.key === "Enter") onPick(Number(svg.getAttribute("aria-valuenow")));
    else if (to !== undefined) go(steps[Math.min(steps.length - 1, Math.max(0, to))]);
    else return;
    event.preventDefault();
  });
  charts.push(move);
  return make(
    "figure",
    {},
    make("figcaption", {}, panel.title, " ", make("span", { class: "unit" }, bare ? "" : panel.unit)),
    svg,
    rows,
  );
}

function curves({ groups, sections }, onPick) {
  for (const { label, colour, dash, runs } of groups) {
    const line = draw("line", {
      x1: 0,
      x2: 34,
      y1: 6,
      y2: 6,
      "stroke-dasharray": DASHES[dash],
      style: `stroke: ${colourOf(colour)}; stroke-width: 2`,
    });
    const names = runs.length > 1 ? `${runs.length} seeds` : runs[0] === label ? "" : runs[0];
    byId("legend").append(
      make(
        "li",
        { title: runs.join(", ") },
        draw("svg", { width: 34, height: 12, "aria-hidden": "true" }, line),
        label,
        " ",
        make("small", {}, names),
      ),
    );
  }
  const steps = sections.flatMap(({ panels }) =>
    panels.flatMap((panel) => panel.curves.flatMap((curve) => curve.steps)),
  );
  const ends = steps.reduce(([low, high], step) => [Math.min(low, step), Math.max(high, step)], [Infinity, -Infinity]);
  let now = ends[1];
  const goTo = (step) => charts.forEach((move) => move((now = step)));
  for (const { title, kind, panels } of sections) {
    const bins = kind === "bins"; // of one metric: on one scale, to be compared
    const grid = make("div", { class: kind === "glance" ? "panels large" : "panels" });
    const show = () => {
      grid.append(
        ...panels.map((panel) => chart(panel, groups, extent(bins ? panels : [panel]), ends, bins, goTo, onPick)),
      );
      goTo(now);
    };
    if (kind === "folded") {
      const details = make("details", {}, make("summary", {}, title), grid);
      details.addEventListener("toggle", show, { once: true });
      byId("panels").append(details);
    } else {
      byId("panels").append(
        make("h3", {}, title, " ", make("span", { class: "unit" }, bins ? panels[0].unit : "")),
        grid,
      );
      show();
    }
  }
}

// ---- the list of answers ----

let current = []; // the opened answers, one or two
const ROWS = 200; // drawn at once; a button draws the rest
const verdict = (answer) => (answer.correct === true ? "correct" : answer.correct === false ? "incorrect" : "–");

function chooseFrom(select, any, values) {
  select.append(make("option", { value: "" }, any), ...values.map(([value, text]) => make("option", { value }, text)));
}

function list({ answers, runs }) {
  const form = byId("filter");
  const fields = form.elements;
  const unique = (key) => [...new Set(answers.map((answer) => answer[key]))];
  chooseFrom(
    fields.step,
    "all",
    unique("step")
      .sort((a, b) => a - b)
      .map((step) => [step, step]),
  );
  chooseFrom(
    fields.run,
    "all",
    runs.map((name, i) => [i, name]),
  );
  chooseFrom(
    fields.reason,
    "any",
    unique("reason")
      .filter((reason) => reason !== null)
      .sort()
      .map((reason) => [reason, reason]),
  );
  const texts = answers.map(() => null); // problem and answer in lower case, made at the first search
  const orders = {
    step: (a) => -a.step,
    clipped: (a) => -(a.up + a.down),
    tokens: (a) => -a.tokens,
    reward: (a) => -a.reward,
  };

  function matches(answer, i, wanted) {
    for (const key of ["step", "run", "correct", "reason", "truncated"])
      if (wanted[key] !== "" && String(answer[key]) !== wanted[key]) return false;
    if (wanted.low !== "" && !(answer.reward >= Number(wanted.low))) return false;
    if (wanted.high !== "" && !(answer.reward <= Number(wanted.high))) return false;
    if (!wanted.text) return true;
    texts[i] ??= `${answer.problem ?? ""}\n${answer.answer}`.toLowerCase();
    return texts[i].includes(wanted.text.toLowerCase());
  }

  function row(i) {
    const answer = answers[i];
    const clipped =
      [answer.up ? `▲ ${answer.up}` : "", answer.down ? `▼ ${answer.down}` : ""].join(" ").trim() || "0";
    const texts = [
      runs[answer.run],
      answer.step,
      null,
      answer.reason ?? "–",
      show(answer.reward),
      show(answer.advantage),
      show(answer.tokens, 9) + (answer.truncated ? " cut" : ""),
      clipped,
    ];
    const line = make(
      "tr",
      { id: `row-${i}`, "aria-current": current.includes(i) ? "true" : null },
      make("td", {}, make("a", { href: `#answer=${i}` }, answer.problem?.trim().slice(0, 200) || "(no problem)")),
      ...texts.map((text) => make("td", {}, text)),
    );
    line.children[3].append(make("span", { class: verdict(answer) }, verdict(answer)));
    return line;
  }

  function update() {
    const wanted = Object.fromEntries(new FormData(form));
    const order = orders[wanted.order];
    const found = answers.map((_, i) => i).filter((i) => matches(answers[i], i, wanted));
    found.sort((a, b) => order(answers[a]) - order(answers[b]));
    byId("count").textContent = `${found.length} of ${answers.length} answers`;
    const body = document.querySelector("#list tbody");
    body.replaceChildren(...found.slice(0, ROWS).map(row));
    if (found.length > ROWS) {
      const more = make("button", { type: "button" }, `show all ${found.length}`);
      more.addEventListener("click", () => body.replaceChildren(...found.map(row)));
      body.append(make("tr", {}, make("td", { colspan: 9 }, more)));
    }
  }
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.querySelector("#list tbody").addEventListener("click", (event) => {
    const line = event.target.closest("tr[id]");
    if (line) location.hash = `answer=${line.id.slice(4)}`;
  });
  update();
  return (step) => {
    if (![...fields.step.options].some((option) => option.value === String(step))) return;
    fields.step.value = step;
    update();
    form.scrollIntoView();
    fields.step.focus();
  };
}

// ---- an opened answer ----

// What tokens can be coloured by: a strength, full at 1 (at -1 for the hue `below`), and the scale's ends in words.
const CHOICES = {
  p: {
    name: "old probability",
    ends: ["1", "0.001 and rarer"],
    above: "230 159 0",
    strength: (t, i) => -Math.log10(t.p[i] ?? 1) / 3,
  },
  r: {
    name: "ratio after the last update",
    ends: ["½ and below", "2 and above"],
    below: "213 94 0",
    above: "0 114 178",
    strength: (t, i) => Math.log2(t.r[i] ?? 1),
  },
  entropy: {
    name: "entropy",
    ends: ["0", "2 nats and more"],
    above: "0 158 115",
    strength: (t, i) => (t.entropy[i] ?? 0) / 2,
  },
  width: {
    name: "interval width",
    ends: ["0.1", "10 and more"],
    above: "86 180 233",
    strength: (t, i) => (t.upper[i] === null ? 1 : Math.log10((t.upper[i] - t.lower[i]) / 0.1) / 2),
  },
  weight: {
    name: "gradient weight",
    ends: ["0", "2 and more"],
    above: "204 121 167",
    strength: (t, i) => (t.weight[i] ?? 0) / 2,
  },
  none: { name: "nothing", ends: [], strength: () => 0 },
};

function background(choice, t, i) {
  const strength = choice.strength(t, i);
  const hue = strength < 0 ? choice.below : choice.above;
  return hue && Math.abs(strength) > 0.02
    ? `rgb(${hue} / calc(var(--tint) * ${clamp(Math.abs(strength)).toFixed(2)}))`
    : "";
}

const hasInterval = (t) => t.lower.some((bound) => bound !== null); // not with a rule that gives a weight instead
const NUMBERS = [
  ["old probability p", (t, i) => show(t.p[i])],
  ["ratio r", (t, i) => show(t.r[i])],
  ["interval", (t, i) => (hasInterval(t) ? `[${show(t.lower[i])}, ${show(t.upper[i] ?? "∞")}]` : "none")],
  ["gradient weight w", (t, i) => show(t.weight[i])],
  ["entropy", (t, i) => `${show(t.entropy[i])} nats`],
  ["rollout probability", (t, i) => show(t.rollout[i])],
  ["token id", (t, i) => show(t.id[i], 9)],
];
const CLIPPED = { 1: "clipped up", 0: "", "-1": "clipped down" };

function tipAt(span, t, i) {
  const tip = byId("tip");
  const box = span.getClientRects()[0]; // the first line of a token that is broken over two
  tip.replaceChildren(
    make("b", {}, JSON.stringify(t.text[i])),
    ` ${i + 1} of ${t.text.length}`,
    CLIPPED[t.clip[i]] ? `, ${CLIPPED[t.clip[i]]}` : "",
    make(
      "table",
      {},
      ...NUMBERS.map(([name, of]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, of(t, i)))),
    ),
  );
  tip.hidden = false;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  const below = box.bottom + tip.offsetHeight + 12 < innerHeight;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
}

function tokens(t, slot, onMove) {
  const box = make("div", {
    class: "tokens",
    tabindex: 0,
    role: "listbox",
    "aria-label": "Tokens. Arrow keys move; n and p go to the next and the previous clipped token.",
  });
  const spans = t.text.map((text, i) => {
    const span = make("span", {
      class: `token ${{ 1: "up", 0: "", "-1": "down" }[t.clip[i]]}`,
      id: `t${slot}-${i}`,
      role: "option",
    });
    for (const part of String(text).split(/(\n)/)) {
      if (part === "\n") span.append(make("span", { class: "mark", "aria-hidden": "true" }, "↵"));
      span.append(part);
    }
    return span;
  });
  box.append(...spans);
  let here = -1;
  function goTo(i, scroll) {
    spans[here]?.classList.remove("here");
    if (!spans[(here = i)]) return;
    spans[i].classList.add("here");
    spans[i].setAttribute(
      "aria-label",
      `${t.text[i]}: ${CLIPPED[t.clip[i]]} ${NUMBERS.map(([name, of]) => `${name} ${of(t, i)}`).join(", ")}`,
    );
    box.setAttribute("aria-activedescendant", spans[i].id);
    if (scroll) spans[i].scrollIntoView({ block: "nearest" });
    tipAt(spans[i], t, i);
    onMove(i);
  }
  const nextClipped = (from, by) => {
    for (let i = from + by; i >= 0 && i < spans.length; i += by) if (t.clip[i]) return i;
    return here;
  };
  function leave() {
    spans[here]?.classList.remove("here");
    byId("tip").hidden = true;
    onMove(null);
  }
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const end = spans.length - 1;
    const to = {
      ArrowRight: () => Math.min(end, here + 1),
      ArrowDown: () => Math.min(end, here + 1),
      ArrowLeft: () => Math.max(0, here - 1),
      ArrowUp: () => Math.max(0, here - 1),
      Home: () => 0,
      End: () => end,
      n: () => nextClipped(here, 1),
      p: () => nextClipped(here, -1),
    }[event.key];
    if (event.key === "Escape") leave();
    if (!to) return;
    event.preventDefault();
    goTo(to(), true);
  });
  box.addEventListener("mouseover", (event) => {
    const span = event.target.closest(".token");
    if (span) goTo(Number(span.id.split("-")[1]), false);
  });
  box.addEventListener("mouseleave", leave);
  box.addEventListener("blur", leave);
  const paint = (choice) => spans.forEach((span, i) => (span.style.background = background(choice, t, i)));
  return { box, paint, goTo: (i) => (box.focus({ preventScroll: true }), goTo(i, true)) };
}

// Ratio over old probability, both on log axes: each token a point, the two lines the ends of its interval. A token
// beyond the axes is drawn at their edge, a line is cut off there.
function map(t, advantage) {
  const width = 400;
  const height = 190;
  const left = 44;
  const top = 8;
  const rarest = 1e-4;
  const steepest = 4;
  const x = (p) => (1 - Math.log10(Math.max(p, 1e-12)) / Math.log10(rarest)) * width;
  const y = (r) => (0.5 - Math.log2(Math.max(r, 1e-9)) / Math.log2(steepest) / 2) * height;
  const svg = draw("svg", {
    viewBox: `0 0 ${left + width + 8} ${top + height + 36}`,
    class: "map",
    role: "img",
    "aria-label": "Ratio over old probability of each token, with its interval",
  });
  for (const r of [0.25, 0.5, 1, 2, 4])
    svg.append(
      draw("line", { class: "grid", x1: left, x2: left + width, y1: top + y(r), y2: top + y(r) }),
      draw("text", { x: left - 6, y: top + y(r) + 3, "text-anchor": "end" }, r),
    );
  for (const p of [1e-4, 1e-3, 1e-2, 0.1, 1])
    svg.append(draw("text", { x: left + x(p), y: top + height + 15, "text-anchor": "middle" }, p));
  svg.append(
    draw("text", { x: left + width / 2, y: top + height + 31, "text-anchor": "middle" }, "old probability p"),
    draw("text", { transform: `translate(10 ${top + height / 2}) rotate(-90)`, "text-anchor": "middle" }, "ratio r"),
  );
  const inside = svg.appendChild(draw("svg", { x: left, y: top, width, height })); // cuts off what is beyond
  const order = t.p
    .map((_, i) => i)
    .filter((i) => t.p[i] !== null && t.r[i] !== null)
    .sort((a, b) => t.p[a] - t.p[b]);
  const ends = hasInterval(t) ? order : [];
  for (const [side, acts] of [
    ["upper", advantage > 0],
    ["lower", advantage < 0],
  ])
    inside.append(
      draw("path", {
        d: path(ends.map((i) => [x(t.p[i]), y(t[side][i] ?? 1e9)])),
        style: `fill: none; stroke: var(--ink); stroke-width: ${acts ? 1.6 : 0.8}; stroke-opacity: ${acts ? 1 : 0.45}`,
      }),
    );
  const placed = (i) => [left + clamp(x(t.p[i]) / width) * width, top + clamp(y(t.r[i]) / height) * height];
  for (const [clip, size, style] of [
    [0, 1.8, "fill: var(--soft); fill-opacity: .45"],
    [1, 2.6, "fill: rgb(var(--up))"],
    [-1, 2.6, "fill: rgb(var(--down))"],
  ]) {
    const arc = (width) => `a${size} ${size} 0 1 0 ${width} 0`;
    const circle = (i) =>
      `M${(placed(i)[0] - size).toFixed(1)} ${placed(i)[1].toFixed(1)}${arc(2 * size)}${arc(-2 * size)}`;
    svg.append(
      draw("path", {
        d: order
          .filter((i) => t.clip[i] === clip)
          .map(circle)
          .join(""),
        style,
      }),
    );
  }
  const ring = svg.appendChild(
    draw("circle", { r: 5, visibility: "hidden", style: "fill: none; stroke: var(--ink); stroke-width: 1.6" }),
  );
  function point(i) {
    ring.setAttribute("visibility", i === null || t.p[i] === null || t.r[i] === null ? "hidden" : "visible");
    if (i !== null) fill(ring, { cx: placed(i)[0], cy: placed(i)[1] }, []);
  }
  const side = advantage > 0 ? "A > 0: only the upper" : "A < 0: only the lower";
  const lines = `lines: the ends of its interval. ${advantage ? `${side} end (thick) can hold a token back.` : ""}`;
  const acting = hasInterval(t) ? lines : "the rule gives weights and no interval.";
  const caption = make(
    "figcaption",
    {},
    "Ratio over old probability ",
    make("span", { class: "unit" }, `a point a token, ${acting}${advantage ? "" : " A = 0."}`),
  );
  return { figure: make("figure", {}, caption, svg), point };
}

async function article({ answers, runs }, i, slot) {
  const answer = answers[i];
  const box = make("article", {
    class: "answer",
    "aria-label": `Answer of ${runs[answer.run]} at step ${answer.step}`,
  });
  const head = make(
    "header",
    {},
    make("h3", { tabindex: -1 }, `${runs[answer.run]}, step ${answer.step}`),
    make("span", { class: verdict(answer) }, verdict(answer)),
  );
  box.append(head);
  const facts = {
    reason: answer.reason,
    reward: answer.reward,
    advantage: answer.advantage,
    gold: answer.gold,
    extracted: answer.extracted,
    tokens: answer.tokens,
    truncated: { true: "yes", false: "no" }[answer.truncated],
  };
  const say = (x) => (typeof x === "number" ? show(x, 6) : show(x));
  box.append(
    make(
      "dl",
      { class: "facts" },
      ...Object.entries(facts).map(([name, value]) =>
        make("div", {}, make("dt", {}, name), make("dd", { "data-fact": name }, say(value))),
      ),
    ),
  );
  box.append(make("pre", { "aria-label": "Problem" }, answer.problem ?? ""));
  const t = await unpack(`tokens-${i}`);
  const picture = map(t, answer.advantage);
  const text = tokens(t, slot, picture.point);
  const count = (test) => t.p.filter((_, k) => test(k)).length;
  const moved = t.r.map((r) => Math.abs(Math.log2(r ?? 1)));
  const furthest = moved.indexOf(moved.reduce((a, b) => Math.max(a, b), 0));
  const jump = (label, to) => {
    const button = make("button", { type: "button" }, label);
    button.addEventListener("click", () => text.goTo(to));
    return button;
  };
  const firstClipped = t.clip.findIndex((clip) => clip);
  box.append(
    make(
      "p",
      { class: "summary" },
      `${count((k) => t.p[k] < 0.01)} of ${t.text.length} tokens were rarer than 1 %, `,
      `${count((k) => moved[k] > Math.log2(1.2))} moved by more than a fifth, `,
      `${answer.up + answer.down} clipped. `,
      jump(`furthest moved: r ${show(t.r[furthest], 3)}`, furthest),
      " ",
      firstClipped < 0 ? null : jump("first clipped", firstClipped),
    ),
    picture.figure,
    text.box,
    make("details", {}, make("summary", {}, "Answer as plain text"), make("pre", {}, answer.answer)),
  );
  return { box, paint: text.paint };
}

function opener(data) {
  const { answers, runs } = data;
  const colour = byId("colour");
  const beside = byId("beside");
  colour.append(...Object.entries(CHOICES).map(([value, { name }]) => make("option", { value }, name)));
  let shown = [];
  let turn = 0; // of opening
  function paint() {
    const { ends, below, above } = CHOICES[colour.value];
    const full = (hue) => (hue ? `rgb(${hue} / var(--tint))` : "transparent");
    const bar = make("i", {
      style: `background: linear-gradient(90deg, ${full(below)}, ${below ? "transparent, " : ""}${full(above)})`,
    });
    byId("scale").replaceChildren(...(ends.length ? [ends[0], bar, ends[1]] : []));
    shown.forEach((one) => one.paint(CHOICES[colour.value]));
  }
  colour.addEventListener("change", paint);
  beside.addEventListener(
    "change",
    () => (location.hash = `answer=${beside.dataset.of}` + (beside.value && `&beside=${beside.value}`)),
  );

  function offerBeside(i, chosen) {
    const same = answers.map((_, j) => j).filter((j) => j !== i && answers[j].prompt === answers[i].prompt);
    same.sort((a, b) => Math.abs(answers[a].step - answers[i].step) - Math.abs(answers[b].step - answers[i].step));
    beside.replaceChildren();
    chooseFrom(
      beside,
      same.length ? "nothing" : "no other answer to this prompt",
      same.map((j) => [
        j,
        `${runs[answers[j].run]}, step ${answers[j].step}, ${verdict(answers[j])}, reward ${show(answers[j].reward)}`,
      ]),
    );
    beside.value = chosen ?? "";
    beside.dataset.of = i;
  }
  return async function () {
    const state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    if (!answers[state.answer]) return;
    const wanted = [state.answer, state.beside].filter((i) => answers[i]).map(Number);
    const mine = ++turn;
    const made = await Promise.all(wanted.map((i, slot) => article(data, i, slot)));
    if (mine !== turn) return; // another answer was asked for meanwhile
    shown = made;
    byId("opened").replaceChildren(...shown.map((one) => one.box));
    offerBeside(wanted[0], wanted[1]);
    byId("tools").hidden = false;
    document.querySelectorAll("#list tr[aria-current]").forEach((row) => row.removeAttribute("aria-current"));
    current = wanted;
    current.forEach((i) => byId(`row-${i}`)?.setAttribute("aria-current", "true"));
    paint();
    shown[0].box.querySelector("h3").focus({ preventScroll: true });
    shown[0].box.scrollIntoView({ block: "start" });
  };
}

async function start() {
  const data = await unpack("index");
  const toStep = data.answers.length ? list(data) : () => {};
  curves(data, toStep);
  const open = opener(data);
  addEventListener("hashchange", open);
  await open();
  document.body.dataset.readyMs = Math.round(performance.now()); // since the page was asked for
}
start().catch((error) => {
  const needs = "It needs a browser of 2023 or later; a file that was cut off is to be written again.";
  const note = make("p", { class: "note", role: "alert" }, `The page could not be drawn (${error}). ${needs}`);
  document.querySelector("main").prepend(note);
  throw error;
});
