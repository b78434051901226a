"use strict";
// Curves: drawn when they come into view, in the page's own colours, and again when light turns to dark.
(() => {
  const source = document.getElementById("curve-data");
  if (!source || !window.Plotly) return;
  const curves = JSON.parse(source.textContent);
  const drawn = new Set();
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function trace(series, colors) {
    const color = colors[series.color % colors.length];
    const raw = series.role === "raw";
    return {
      x: series.x, y: series.y, name: series.name, type: "scatter", mode: series.x.length < 12 ? "lines+markers" : "lines",
      line: { color, width: raw ? 1 : 2, shape: "linear" }, marker: { color, size: 5 }, opacity: raw ? 0.25 : 1,
      showlegend: !raw, hoverinfo: raw ? "skip" : undefined, hovertemplate: raw ? undefined : "%{y:.4~g}",
    };
  }

  function draw(element) {
    const { traces } = curves[element.id];
    const colors = ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5"].map(css);
    const named = traces.filter((series) => series.role !== "raw").length;
    const perRow = traces.some((series) => series.name.length > 14) ? 1 : 2;
    const rows = named > 1 ? Math.ceil(named / perRow) : 0;
    const axis = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true, nticks: 5 };
    const layout = {
      margin: { l: 8, r: 8, t: 8 + 18 * rows, b: 8 }, height: 202 + 18 * rows, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css("--font"), size: 11, color: css("--quiet") }, hovermode: "x unified",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, entrywidth: 0.96 / perRow, entrywidthmode: "fraction" }, showlegend: named > 1,
      xaxis: { ...axis, showgrid: false, ticks: "outside", tickcolor: css("--line"), hoverformat: "d", ticklabeloverflow: "allow" },
      yaxis: { ...axis, exponentformat: "power" }, dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
    };
    Plotly.react(element, traces.map((series) => trace(series, colors)), layout, { displayModeBar: false });
    element.style.height = "auto";
    drawn.add(element);
    sizes.observe(element);
  }

  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) if (target.offsetWidth) Plotly.Plots.resize(target);
  });

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
  }, { rootMargin: "600px" });
  document.querySelectorAll(".plot").forEach((element) => watcher.observe(element));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
})();

// Samples: each group of buttons narrows what is shown.
(() => {
  const wanted = { outcome: "", model: "", task: "" };
  const buttons = [...document.querySelectorAll("button[data-filter]")];
  const count = document.querySelector(".shown");
  if (!count) return;

  function show() {
    let shown = 0;
    for (const problem of document.querySelectorAll(".problem")) {
      let here = 0;
      for (const answer of problem.querySelectorAll(".answer")) {
        answer.hidden = ["outcome", "model"].some((name) => wanted[name] && answer.dataset[name] !== wanted[name]);
        here += !answer.hidden;
      }
      problem.hidden = !here || Boolean(wanted.task && problem.dataset.task !== wanted.task);
      shown += problem.hidden ? 0 : here;
    }
    count.textContent = `${shown} ${shown === 1 ? "answer" : "answers"}`;
  }

  for (const button of buttons) {
    button.addEventListener("click", () => {
      const { filter, value } = button.dataset;
      wanted[filter] = value;
      for (const other of buttons) {
        if (other.dataset.filter === filter) other.setAttribute("aria-pressed", String(other === button));
      }
      show();
    });
  }
  show();
})();

// Life: a stage under the pointer or the keyboard's focus lights up what it read and who reads it.
for (const row of document.querySelectorAll(".life li")) {
  const touch = (on) => () => {
    for (const edge of document.querySelectorAll(".edge")) {
      edge.classList.toggle("lit", on && [edge.dataset.from, edge.dataset.to].includes(row.dataset.stage));
    }
  };
  row.addEventListener("pointerenter", touch(true));
  row.addEventListener("pointerleave", touch(false));
  row.addEventListener("focusin", touch(true));
  row.addEventListener("focusout", touch(false));
}

// A link to a stage opens it.
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
