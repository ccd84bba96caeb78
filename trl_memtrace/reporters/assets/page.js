/* Draws every figure of the page, and lets a reader walk along its bands by pointer, finger or key. */
"use strict";
(() => {
  const coarse = matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displayModeBar: false, scrollZoom: false, showTips: false };
  const plots = [];

  function nearest(values, wanted) {
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] <= wanted) low = middle; else high = middle;
    }
    return wanted - values[low] <= values[high] - wanted ? low : high;
  }

  function element(parent, className) {
    const made = document.createElement("div");
    made.className = className;
    parent.append(made);
    return made;
  }

  /* The readout beside a stacked figure: what every band holds where the cursor stands. */
  function reader(figure, plot, bands, meta) {
    const xs = bands[0].x, when = figure.querySelector(".when"), home = when.textContent;
    const rows = [...figure.querySelectorAll("tr[data-band]")];
    const totals = [...figure.querySelectorAll("[data-total]")], others = [...figure.querySelectorAll("tr[data-other]")];
    const cursor = element(plot, "cursor"), tip = element(plot, "tip");
    const levels = xs.map((_, i) => bands.reduce((sum, band) => sum + band.y[i], 0));
    let at = meta.at, under = -1;

    const size = (value) => value === null ? "-" : value.toFixed(2);
    const share = (value, whole) => (whole ? (100 * value / whole).toFixed(1) : "0.0") + "%";

    function show(index, band, atHome) {
      at = index;
      under = band;
      when.textContent = atHome ? home : meta.labels[index];
      for (const row of rows) {
        const value = bands[row.dataset.band].y[index];
        row.querySelector(".value").textContent = size(value);
        row.querySelector(".part").textContent = share(value, levels[index]);
        row.classList.toggle("under", Number(row.dataset.band) === band);
      }
      for (const total of totals) total.textContent = size(levels[index]);
      for (const row of others) row.querySelector(".value").textContent = size(meta.others[row.dataset.other].y[index]);
      if (atHome) {
        cursor.style.display = tip.style.display = "none";
        return;
      }
      const area = plot._fullLayout, box = area._size, left = box.l + area.xaxis.d2p(xs[index]);
      const shown = left >= box.l - 1 && left <= box.l + box.w + 1;
      cursor.style.cssText = `display:${shown ? "block" : "none"};left:${left}px;top:${box.t}px;height:${box.h}px`;
      tip.textContent = band < 0 ? `${size(levels[index])} ${meta.unit}` : `${bands[band].meta.name} ${size(bands[band].y[index])} ${meta.unit}`;
      tip.style.display = shown ? "block" : "none";
      const flip = left > plot.clientWidth / 2;
      tip.style.left = flip ? "auto" : `${left + 8}px`;
      tip.style.right = flip ? `${plot.clientWidth - left + 8}px` : "auto";
      let below = 0;
      for (let i = 0; i < band; i++) below += bands[i].y[index];
      const height = band < 0 ? levels[index] : below + bands[band].y[index] / 2;
      tip.style.top = `${Math.max(0, Math.min(box.t + area.yaxis.d2p(height) - 12, plot.clientHeight - 24))}px`;
    }

    function point(event) {
      const area = plot._fullLayout, box = area._size, frame = plot.getBoundingClientRect();
      const index = nearest(xs, area.xaxis.p2d(event.clientX - frame.left - box.l));
      let rest = area.yaxis.p2d(event.clientY - frame.top - box.t), band = -1;
      for (let i = 0; i < bands.length && band < 0 && rest >= 0; i++) {
        if (rest < bands[i].y[index]) band = i;
        rest -= bands[i].y[index];
      }
      show(index, band, false);
    }

    function held(from, step) { /* the next band that holds anything here */
      for (let i = from + step; i >= 0 && i < bands.length; i += step) if (bands[i].y[at] > 0) return i;
      return from;
    }

    const stride = Math.max(1, Math.round(xs.length / 20));
    const moves = {
      ArrowLeft: (event) => show(Math.max(0, at - (event.shiftKey ? stride : 1)), under, false),
      ArrowRight: (event) => show(Math.min(xs.length - 1, at + (event.shiftKey ? stride : 1)), under, false),
      ArrowUp: () => show(at, held(under, 1), false),
      ArrowDown: () => show(at, held(under < 0 ? bands.length : under, -1), false),
      Home: () => show(0, under, false),
      End: () => show(xs.length - 1, under, false),
      p: () => show(meta.at, under, false),
      Escape: () => show(meta.at, -1, true),
    };
    plot.addEventListener("keydown", (event) => {
      const move = event.ctrlKey || event.metaKey || event.altKey ? undefined : moves[event.key];
      if (!move) return;
      event.preventDefault();
      when.setAttribute("aria-live", "polite");
      move(event);
      figure.querySelector(".said").textContent = `${when.textContent}: ${tip.textContent}`;
    });
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", () => show(meta.at, -1, true));
    plot.addEventListener("blur", () => show(meta.at, -1, true));
    plot.on("plotly_relayout", () => show(at, -1, true));
  }

  async function draw(figure) {
    const spec = JSON.parse(figure.querySelector("script").textContent), plot = figure.querySelector(".plot");
    const bands = spec.data.filter((trace) => trace.stackgroup), meta = spec.layout.meta || {};
    const walked = Boolean(figure.querySelector(".readout"));
    if (walked) {
      spec.layout.hovermode = false;
      spec.layout.showlegend = false;
    }
    if (coarse) spec.layout.dragmode = false;
    await Plotly.newPlot(plot, spec.data, spec.layout, config);
    if (walked) reader(figure, plot, bands, meta);
    plots.push(plot);
    figure.dataset.drawn = "";
  }

  async function drawAll() {
    for (const figure of document.querySelectorAll("figure[data-figure]")) {
      await draw(figure);
      await new Promise((resolve) => setTimeout(resolve));
    }
    document.documentElement.dataset.ready = "";
  }

  /* plotly.js takes a second to start: the page is there to be read before it does. */
  function start() {
    const source = document.getElementById("plotly"), script = document.createElement("script");
    script.textContent = source.textContent;
    source.remove();
    document.head.append(script);
    drawAll();
  }

  const paper = () => plots.forEach((plot) => Plotly.relayout(plot, { width: 660, height: 320 }));
  const screen = () => plots.forEach((plot) => Plotly.relayout(plot, { width: null, height: null, autosize: true }));
  addEventListener("beforeprint", paper);
  addEventListener("afterprint", screen);
  addEventListener("load", () => requestAnimationFrame(() => setTimeout(start)));
})();
