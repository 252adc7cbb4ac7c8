(() => {
const D = JSON.parse(document.getElementById("data").textContent);
const state = {axis: D.axes[0].key, part: "all", hidden: new Set()};
const tip = document.getElementById("tip");
const color = index => `var(--c${index % 8})`;
const finite = value => value !== null && isFinite(value);
const escape = text => String(text).replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));

function si(value) {
  for (const [factor, letter] of [[1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= 0.9995 * factor) return +(value / factor).toPrecision(3) + letter;
  return String(+value.toPrecision(3));
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find(factor => factor * power >= raw * 0.999) * power;
  const list = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) list.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return {list, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (String(step / power).includes(".") ? 1 : 0))};
}

function marker(index, x, y, size) {
  const paint = `fill="${color(index)}" stroke="var(--card)" stroke-width="1.2"`;
  const at = points => `<polygon ${paint} points="${points.map(([dx, dy]) => `${x + dx * size},${y + dy * size}`).join(" ")}"/>`;
  switch (index % 4) {
    case 0: return `<circle ${paint} cx="${x}" cy="${y}" r="${size}"/>`;
    case 1: return at([[-.9, -.9], [.9, -.9], [.9, .9], [-.9, .9]]);
    case 2: return at([[0, -1.2], [1.1, .8], [-1.1, .8]]);
    default: return at([[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]]);
  }
}

function path(xs, ys, px, py) {
  let text = "", pen = "M";
  xs.forEach((x, i) => {
    if (!finite(ys[i])) { pen = "M"; return; }
    text += `${pen}${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}`;
    pen = "L";
  });
  return text;
}

function frame(host, height, xRange, yRange, label, signed) {
  const width = Math.max(320, host.clientWidth), box = {left: 68, right: width - 16, top: 12, bottom: height - 44};
  const px = x => box.left + (x - xRange[0]) / (xRange[1] - xRange[0] || 1) * (box.right - box.left);
  const py = y => box.bottom - (y - yRange[0]) / (yRange[1] - yRange[0] || 1) * (box.bottom - box.top);
  const vertical = ticks(yRange[0], yRange[1], 6), horizontal = ticks(xRange[0], xRange[1], width > 700 ? 8 : 4);
  let body = "";
  for (const y of vertical.list) body += `<line x1="${box.left}" x2="${box.right}" y1="${py(y)}" y2="${py(y)}" stroke="var(--grid)"/>` +
    `<text x="${box.left - 9}" y="${py(y) + 4}" text-anchor="end">${signed && y > 0 ? "+" : ""}${y.toFixed(vertical.digits)}</text>`;
  for (const x of horizontal.list) body += `<text x="${px(x)}" y="${box.bottom + 19}" text-anchor="middle">${x ? si(x) : 0}</text>`;
  body += `<line x1="${box.left}" x2="${box.right}" y1="${box.bottom}" y2="${box.bottom}" stroke="var(--line)"/>` +
    `<text x="${(box.left + box.right) / 2}" y="${height - 5}" text-anchor="middle">${label}</text>` +
    `<text x="${box.left - 58}" y="${(box.top + box.bottom) / 2}" text-anchor="middle" transform="rotate(-90 ${box.left - 58} ${(box.top + box.bottom) / 2})">nat per token</text>`;
  return {width, height, box, px, py, body, xRange};
}

function show(host, f, extra, hover) {
  host.innerHTML = `<svg viewBox="0 0 ${f.width} ${f.height}" role="img" aria-label="${host.id} curves"><defs><clipPath id="clip-${host.id}">` +
    `<rect x="${f.box.left}" y="${f.box.top - 6}" width="${f.box.right - f.box.left + 10}" height="${f.box.bottom - f.box.top + 6}"/></clipPath></defs>` +
    f.body + `<g clip-path="url(#clip-${host.id})">${extra}</g><g class="cursor"></g>` +
    `<rect class="catch" x="${f.box.left}" y="${f.box.top}" width="${f.box.right - f.box.left}" height="${f.box.bottom - f.box.top}" fill="transparent"/></svg>`;
  const svg = host.firstChild, cursor = svg.querySelector(".cursor"), area = svg.querySelector(".catch");
  area.addEventListener("pointermove", event => {
    const bounds = svg.getBoundingClientRect(), scale = f.width / bounds.width;
    const part = ((event.clientX - bounds.left) * scale - f.box.left) / (f.box.right - f.box.left);
    const result = hover(f.xRange[0] + part * (f.xRange[1] - f.xRange[0]));
    if (!result) return;
    cursor.innerHTML = `<line x1="${f.px(result.x)}" x2="${f.px(result.x)}" y1="${f.box.top}" y2="${f.box.bottom}" stroke="var(--soft)" stroke-dasharray="3 3"/>` + result.marks;
    tip.innerHTML = result.html;
    tip.hidden = false;
    const room = event.clientX + tip.offsetWidth + 28 < innerWidth;
    tip.style.left = (room ? event.clientX + 18 : event.clientX - tip.offsetWidth - 18) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  area.addEventListener("pointerleave", () => { tip.hidden = true; cursor.innerHTML = ""; });
}

function nearest(xs, x) {
  let best = -1;
  xs.forEach((value, i) => { if (best < 0 || Math.abs(value - x) < Math.abs(xs[best] - x)) best = i; });
  return best;
}

const visible = () => D.runs.filter(run => run.series[state.axis] && !state.hidden.has(run.name));
const number = value => finite(value) ? value.toFixed(3) : "";
const dot = run => `<i class="dot" style="background:${color(run.index)}"></i>${escape(run.name)}`;

function drawLoss() {
  const host = document.getElementById("loss"), axis = D.axes.find(item => item.key === state.axis), runs = visible();
  const all = D.runs.filter(run => run.series[state.axis]).map(run => run.series[state.axis]);
  const end = Math.max(...all.map(s => s.train_x[s.train_x.length - 1])), xRange = state.part === "all" ? [0, end] : [end / 2, end];
  let yRange = axis.range;
  if (state.part === "end") {
    const inside = all.flatMap(s => [...s.train_x.map((x, i) => [x, s.train_loss[i]]), ...s.validation_x.map((x, i) => [x, s.validation_loss[i]])])
      .filter(([x, y]) => x >= end / 2 && finite(y)).map(point => point[1]);
    if (inside.length) { const low = Math.min(...inside), high = Math.max(...inside), m = (high - low) * 0.06 || 0.05; yRange = [low - m, high + m]; }
  }
  const f = frame(host, 430, xRange, yRange, axis.label, false);
  let extra = "";
  if (D.entropy !== null && D.entropy > yRange[0] && D.entropy < yRange[1]) extra += `<line x1="${f.box.left}" x2="${f.box.right}" y1="${f.py(D.entropy)}" ` +
    `y2="${f.py(D.entropy)}" stroke="var(--soft)" stroke-dasharray="5 4"/><text x="${f.box.right - 4}" y="${f.py(D.entropy) + 16}" text-anchor="end">unigram entropy ${number(D.entropy)}</text>`;
  for (const run of runs) { const s = run.series[state.axis];
    extra += `<path d="${path(s.train_x, s.train_loss, f.px, f.py)}" fill="none" stroke="${color(run.index)}" stroke-width="1.3" stroke-opacity=".8" stroke-linejoin="round"/>`; }
  for (const run of runs) { const s = run.series[state.axis];
    s.validation_x.forEach((x, i) => { if (finite(s.validation_loss[i])) extra += marker(run.index, f.px(x), f.py(s.validation_loss[i]), 5); }); }
  show(host, f, extra, x => {
    if (!runs.length) return null;
    let marks = "", rows = "";
    for (const run of runs) {
      const s = run.series[state.axis], i = nearest(s.train_x, x), j = nearest(s.validation_x, x);
      if (x > s.train_x[s.train_x.length - 1] * 1.02) { rows += `<tr><td>${dot(run)}</td><td>ended</td><td></td></tr>`; continue; }
      if (finite(s.train_loss[i])) marks += `<circle cx="${f.px(s.train_x[i])}" cy="${f.py(s.train_loss[i])}" r="3.5" fill="${color(run.index)}"/>`;
      rows += `<tr><td>${dot(run)}</td><td>${number(s.train_loss[i])}</td><td>${j < 0 ? "" : number(s.validation_loss[j])}</td></tr>`;
    }
    return {x, marks: `<g clip-path="url(#clip-loss)">${marks}</g>`,
      html: `<b>${si(x)} ${escape(axis.label)}</b><table><tr><th></th><th>train</th><th>nearest val</th></tr>${rows}</table>`};
  });
}

function drawGap() {
  const host = document.getElementById("gap");
  if (!host) return;
  const axis = D.axes.find(item => item.key === state.axis), runs = visible().filter(run => run.name !== D.baseline);
  const pairs = s => s.validation_x.map((x, i) => [x, s.gap[i]]).filter(([x, gap]) => x > 0 && finite(gap));
  const all = D.runs.filter(run => run.series[state.axis] && run.name !== D.baseline).map(run => pairs(run.series[state.axis]));
  const later = all.flatMap(list => list.slice(1)).map(point => point[1]), first = all.filter(list => list.length).map(list => list[0][1]);
  // The first validation may differ wildly between learning rates; it may leave the picture then.
  const spread = D.spread ?? 0, reach = Math.max(spread, ...later.map(Math.abs)), values = [...later, ...first.filter(gap => !later.length || Math.abs(gap) < 2 * reach)];
  const end = Math.max(...D.runs.filter(run => run.series[state.axis]).map(run => { const xs = run.series[state.axis].train_x; return xs[xs.length - 1]; }));
  const least = spread * 1.5 || 0.01;
  const low = Math.min(-least, ...values), high = Math.max(least, ...values), margin = (high - low) * 0.06;
  const f = frame(host, 260, [0, end * 1.02], [low - margin, high + margin], axis.label, true);
  const band = `<rect x="${f.box.left}" width="${f.box.right - f.box.left}" y="${f.py(spread)}" height="${f.py(-spread) - f.py(spread)}" fill="var(--band)"/>`;
  let extra = (spread ? band : "") + `<line x1="${f.box.left}" x2="${f.box.right}" y1="${f.py(0)}" y2="${f.py(0)}" stroke="var(--soft)"/>`;
  for (const run of runs) { const list = pairs(run.series[state.axis]);
    extra += `<path d="${path(list.map(p => p[0]), list.map(p => p[1]), f.px, f.py)}" fill="none" stroke="${color(run.index)}" stroke-width="1.8"/>` +
      list.map(([x, gap]) => marker(run.index, f.px(x), f.py(gap), 5)).join(""); }
  show(host, f, extra, x => {
    let rows = "";
    for (const run of runs) { const list = pairs(run.series[state.axis]), i = nearest(list.map(p => p[0]), x);
      if (i >= 0) rows += `<tr><td>${dot(run)}</td><td>${list[i][1] > 0 ? "+" : ""}${list[i][1].toFixed(3)}</td><td>at ${si(list[i][0])}</td></tr>`; }
    return rows ? {x, marks: "", html: `<b>gap to ${escape(D.baseline)}</b><table>${rows}</table>`} : null;
  });
}

function drawLegend() {
  const host = document.getElementById("legend");
  host.innerHTML = D.runs.map(run => `<button type="button" aria-pressed="${!state.hidden.has(run.name)}" data-index="${run.index}">` +
    `<svg width="14" height="14" aria-hidden="true">${marker(run.index, 7, 7, 5)}</svg>${escape(run.name)} <span>${number(run.final)}</span></button>`).join("");
  host.querySelectorAll("button").forEach(button => button.addEventListener("click", () => {
    const name = D.runs[+button.dataset.index].name;
    state.hidden.has(name) ? state.hidden.delete(name) : state.hidden.add(name);
    button.setAttribute("aria-pressed", String(!state.hidden.has(name)));
    draw();
  }));
}

function draw() { drawLoss(); drawGap(); }

document.querySelectorAll(".switch").forEach(group => group.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  state[group.dataset.key] = button.dataset.value;
  group.querySelectorAll("button").forEach(other => other.setAttribute("aria-pressed", String(other === button)));
  draw();
}));
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 80); });
drawLegend();
draw();
})();
