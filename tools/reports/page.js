"use strict";
// Redraws the charts that the page comes with: another x axis, smoothing, runs that are hidden, the
// values under the pointer; and moves previews through a run. The y axes stay as they are drawn.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const LEFT = 50, RIGHT = 18, TOP = 8, BOTTOM = 36, WIDTH = 380, HEIGHT = 216; // as in charts.py
  const state = { axis: "images", share: 0, hidden: new Set() };
  const charts = all(".chart").map(figure => ({
    figure,
    svg: figure.querySelector(":scope > svg"),
    readout: figure.querySelector(".readout"),
    data: JSON.parse(figure.dataset.chart),
    at: null, // of the cross line, as a share of the axis
  }));

  const axisOf = chart => state.axis in chart.data.ends ? state.axis : Object.keys(chart.data.ends)[0];
  const right = (chart, x) => LEFT + x / chart.data.ends[axisOf(chart)] * (WIDTH - LEFT - RIGHT);
  const down = (chart, y) => TOP + (chart.data.high - y) / (chart.data.high - chart.data.low)
    * (HEIGHT - TOP - BOTTOM);

  // An exponential average over the axis itself, not over points: lines that are logged more or
  // less often are smoothed alike. What is before a point counts by exp(-distance / width).
  function smooth(xs, ys, width) {
    if (!width) return ys;
    let sum = 0, weight = 0, before = null;
    return ys.map((y, place) => {
      if (y === null) return null;
      const kept = before === null ? 0 : Math.exp(-Math.max(0, xs[place] - before) / width);
      before = xs[place];
      sum = sum * kept + y;
      weight = weight * kept + 1;
      return sum / weight;
    });
  }

  function pen(chart, xs, ys) {
    let path = "", isDown = false;
    ys.forEach((y, place) => {
      if (y !== null) {
        path += `${isDown ? "L" : "M"}${right(chart, xs[place]).toFixed(1)},${down(chart, y).toFixed(1)}`;
      }
      isDown = y !== null;
    });
    return path;
  }

  function draw(chart) {
    const axis = axisOf(chart), width = state.share * chart.data.ends[axis];
    for (const group of all("[data-axis]", chart.svg)) {
      group.style.display = group.dataset.axis === axis ? "" : "none";
    }
    all(":scope > g[data-run]:not(.best)", chart.svg).forEach((group, place) => {
      const line = chart.data.lines[place], xs = line.x[axis];
      line.shown = smooth(xs, line.y, width);
      group.querySelector(".raw").setAttribute("d", width ? pen(chart, xs, line.y) : "");
      group.querySelector(".line").setAttribute("d", pen(chart, xs, line.shown));
      const dots = group.querySelector(".dots");
      if (dots.getAttribute("d")) {
        dots.setAttribute("d", line.shown.map((y, at) => y === null ? ""
          : `M${right(chart, xs[at]).toFixed(1)},${down(chart, y).toFixed(1)}h0`).join(""));
      }
    });
    point(chart);
  }

  const say = value => value === 0 ? "0" : Math.abs(value) >= 1000
    ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));

  function nearest(xs, ys, x) {
    let found = -1;
    xs.forEach((each, place) => {
      const isNearer = found < 0 || Math.abs(each - x) < Math.abs(xs[found] - x);
      if (ys[place] !== null && isNearer) found = place;
    });
    return found;
  }

  function point(chart) {
    const cross = chart.svg.querySelector(".cross"), readout = chart.readout;
    readout.hidden = chart.at === null;
    cross.setAttribute("d", "");
    if (chart.at === null) return;
    const axis = axisOf(chart), x = chart.at * chart.data.ends[axis];
    const px = right(chart, x).toFixed(1);
    cross.setAttribute("d", `M${px},${TOP}V${HEIGHT - BOTTOM}`);
    const said = [`${say(x)} ${axis}`];
    for (const line of chart.data.lines) {
      const place = nearest(line.x[axis], line.shown, x);
      if (place < 0 || state.hidden.has(line.run)) continue;
      said.push(`${line.run} ${line.label}: ${say(line.shown[place])}`);
    }
    readout.textContent = said.join("\n");
    const isLeft = chart.at > 0.5;
    readout.style.left = isLeft ? "3.4rem" : "auto";
    readout.style.right = isLeft ? "auto" : ".9rem";
  }

  for (const chart of charts) {
    const move = at => { chart.at = at; point(chart); };
    chart.svg.addEventListener("pointermove", event => {
      const box = chart.svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * WIDTH;
      move(Math.min(1, Math.max(0, (x - LEFT) / (WIDTH - LEFT - RIGHT))));
    });
    chart.svg.addEventListener("pointerleave", () => move(null));
    chart.svg.addEventListener("blur", () => move(null));
    chart.svg.addEventListener("keydown", event => {
      const by = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
      if (event.key === "Escape") move(null);
      if (!by) return;
      event.preventDefault();
      move(Math.min(1, Math.max(0, (chart.at ?? 1) + by)));
    });
    draw(chart);
  }

  const smoothing = document.querySelector(".smoothing");
  smoothing.hidden = !charts.length;
  smoothing.querySelector("input").addEventListener("input", event => {
    state.share = event.target.value / 100;
    const text = state.share ? `${event.target.value} %` : "none";
    smoothing.querySelector("output").textContent = text;
    event.target.setAttribute("aria-valuetext", state.share ? `${text} of the axis` : text);
    charts.forEach(draw);
  });

  const axes = document.querySelector(".axes");
  axes.hidden = !charts.length;
  axes.addEventListener("change", event => {
    state.axis = event.target.value;
    charts.forEach(draw);
  });

  const toggles = all("[data-toggle]");
  for (const toggle of toggles) {
    toggle.hidden = toggles.length < 2;
    toggle.addEventListener("change", () => {
      const run = Number(toggle.dataset.toggle);
      state.hidden[toggle.checked ? "delete" : "add"](run);
      for (const each of all(`[data-run="${run}"]`)) each.style.display = toggle.checked ? "" : "none";
    });
  }

  for (const label of all(".scrub")) {
    const slider = label.querySelector("input"), sheets = all(".sheet", label.parentElement);
    const moments = slider.dataset.moments.split(",").map(Number);
    label.hidden = false;
    slider.addEventListener("input", () => {
      const moment = moments[slider.value], text = moment.toLocaleString("en");
      label.querySelector("output").textContent = text;
      slider.setAttribute("aria-valuetext", `${text} images`);
      for (const sheet of sheets) {
        const images = all("img", sheet);
        const shown = images.filter(image => Number(image.dataset.images) <= moment).pop();
        for (const image of images) image.hidden = image !== shown;
        sheet.querySelector(".after").textContent = shown
          ? `after ${Number(shown.dataset.images).toLocaleString("en")} images` : "no preview yet";
      }
    });
  }
  // a browser that goes back to the page has kept what was chosen
  for (const input of all("input")) {
    if (input.type === "range" && input.value !== input.defaultValue) input.dispatchEvent(new Event("input"));
    if (input.type === "radio" && input.checked) input.dispatchEvent(new Event("change", { bubbles: true }));
    if (input.type === "checkbox" && !input.checked) input.dispatchEvent(new Event("change"));
  }
})();
