"use strict";
document.documentElement.classList.add("scripted");
const values = JSON.parse(document.getElementById("values").textContent);
const hidden = new Set();  // names of runs that no chart shows
const filtered = new Set();  // names of runs that the table's filter leaves out

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const pressed = (button) => button.getAttribute("aria-pressed") === "true";
const press = (button, on) => button.setAttribute("aria-pressed", String(on));

function showSeries() {
  for (const chart of all(".chart")) {
    const off = new Set(all("[data-split]:not(g)", chart).filter((each) => !pressed(each)).map((each) => each.dataset.split));
    for (const series of all("g.series", chart)) {
      const run = series.dataset.run;
      series.style.display = hidden.has(run) || filtered.has(run) || off.has(series.dataset.split) ? "none" : "";
    }
  }
}

// Legends of all charts agree.
for (const button of all(".legend button")) {
  button.addEventListener("click", () => {
    const on = !pressed(button);
    for (const run of button.dataset.runs.split("\n")) on ? hidden.delete(run) : hidden.add(run);
    for (const other of all(".legend button")) {
      if (other.dataset.runs === button.dataset.runs) press(other, on);
    }
    showSeries();
  });
}

for (const chart of all(".chart")) {
  const frames = all(".frame[data-axis]", chart);
  const axes = all("[data-axis]:not(.frame)", chart);
  const log = chart.querySelector("button[data-log]");
  const choose = () => {
    const axis = axes.find(pressed);
    for (const frame of frames) {
      frame.hidden = frame.dataset.axis !== axis.dataset.axis || (frame.dataset.log === "true") !== pressed(log);
    }
  };
  for (const button of axes) {
    button.addEventListener("click", () => {
      axes.forEach((each) => press(each, each === button));
      choose();
    });
  }
  log?.addEventListener("click", () => { press(log, !pressed(log)); choose(); });
  for (const button of all("button[data-split]", chart)) {
    button.addEventListener("click", () => { press(button, !pressed(button)); showSeries(); });
  }
  for (const frame of frames) follow(chart, frame);
}

// Under the pointer: a line, and the values of the curves nearest to it.
function follow(chart, frame) {
  const plot = frame.querySelector("svg.plot"), cursor = frame.querySelector(".cursor");
  const tip = chart.querySelector(".tip"), axis = frame.dataset.axis;
  const series = all("g.series", frame).map((group) => {
    const curve = values[chart.id][group.dataset.curve];
    const drawn = group.querySelector("polyline, path");
    const text = drawn.getAttribute("points") ?? drawn.getAttribute("d").replace(/h0/g, " ");
    const numbers = text.match(/-?[\d.]+(?:e[-+]?\d+)?/g).map(Number);
    return { group, curve, x: numbers.filter((_, at) => at % 2 === 0), y: numbers.filter((_, at) => at % 2) };
  });
  const leave = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const across = (1000 * (event.clientX - box.left)) / box.width;
    const up = (1000 * (event.clientY - box.top)) / box.height;
    const near = [];
    for (const each of series) {
      if (each.group.style.display === "none") continue;
      let at = 0;
      each.x.forEach((x, index) => { if (Math.abs(x - across) < Math.abs(each.x[at] - across)) at = index; });
      near.push({ ...each, at, x: each.x[at], y: each.y[at] });
    }
    if (!near.length) return leave();
    const nearest = near.reduce((one, other) => (Math.abs(other.x - across) < Math.abs(one.x - across) ? other : one));
    const shown = near.filter((each) => Math.abs(each.x - nearest.x) < 12)
      .sort((one, other) => Math.abs(one.y - up) - Math.abs(other.y - up)).slice(0, 10)
      .sort((one, other) => one.y - other.y);
    const place = `${nearest.x / 10}%`;
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(row(`${axis === "flops" ? "FLOPs" : axis}`, written(nearest.curve[axis][nearest.at], axis)));
    for (const each of shown) {
      const name = each.curve.run + (each.curve.split === "train" ? ", training" : "");
      tip.append(row(name, each.curve.y[each.at].toFixed(4), each.group.getAttribute("class")));
    }
    tip.hidden = false;
    const outer = tip.parentElement.getBoundingClientRect();
    const left = event.clientX - outer.left;
    const room = outer.width - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(4, left + 16 > room ? Math.min(room, left - tip.offsetWidth - 16) : left + 16)}px`;
    tip.style.top = `${Math.max(4, event.clientY - outer.top - tip.offsetHeight - 12)}px`;
  };
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerleave", leave);
}

function row(name, value, style) {
  const line = document.createElement("div"), label = document.createElement(style ? "span" : "strong");
  label.textContent = name;
  if (style) label.className = style;
  line.append(label, value);
  return line;
}

function written(value, axis) {
  if (axis === "flops") return value.toExponential(3);
  if (axis !== "seconds") return value.toLocaleString("en");
  return value < 120 ? `${value.toFixed(1)} s` : value < 7200 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(2)} h`;
}

// Tables: a click on a heading sorts, empty cells last; the filter keeps the rows that hold all of its words.
for (const table of all("table.sortable")) {
  const body = table.tBodies[0];
  all("thead th", table).forEach((heading, column) => {
    heading.querySelector("button")?.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      all("thead th", table).forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const key = (line) => line.cells[column].dataset.value ?? "";
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [key(one), key(other)];
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b;
        return ascending ? order : -order;
      });
      body.append(...rows);
    });
  });
  document.querySelector(`input[data-filters="${table.id}"]`)?.addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const line of body.rows) {
      const text = line.textContent.toLowerCase();
      line.hidden = !words.every((word) => text.includes(word));
      line.hidden ? filtered.add(line.dataset.run) : filtered.delete(line.dataset.run);
    }
    showSeries();
  });
}
