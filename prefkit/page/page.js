"use strict";
// Draws what the element #data holds; every name in it is text. One click on a run shows or hides it in all charts.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const shown = data.runs.map(() => true);
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const plots = [];
  let moving = false;

  // plotly reads a few tags in its texts: a name has none
  function plain(text) {
    return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function nameOf(trace, chart) {
    const several = chart.traces.some((other) => other.label !== trace.label);
    const parts = data.runs.length > 1 ? [data.runs[trace.run].name] : [];
    return plain(parts.concat(several || !parts.length ? [trace.label] : []).join(", "));
  }

  function tracesOf(chart) {
    const rows = chart.traces.map((trace) => ({
      type: "scatter",
      mode: trace.dots ? "lines+markers" : trace.x.length > 1 ? "lines" : "markers",
      x: trace.x,
      y: trace.y,
      name: nameOf(trace, chart),
      line: { color: data.runs[trace.run].colour, width: trace.dots || trace.x.length < 200 ? 1.8 : 1.1, dash: trace.dash },
      marker: { color: data.runs[trace.run].colour, size: 6 },
      hovertemplate: "%{y:.5~g} at %{x:,}<extra>%{fullData.name}</extra>",
    }));
    const trends = chart.traces.filter((trace) => trace.trend).map((trace) => ({
      type: "scatter",
      mode: "lines",
      x: trace.trend.x,
      y: trace.trend.y,
      name: nameOf(trace, chart) + ", mean of " + trace.trend.rows,
      line: { color: data.runs[trace.run].colour, width: 2.6, dash: trace.dash },
      hovertemplate: "%{y:.5~g} about %{x:,.0f}<extra>%{fullData.name}</extra>",
      visible: false,
    }));
    return rows.concat(trends);
  }

  const layout = {
    margin: { l: 42, r: 10, t: 8, b: 34 },
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", size: 11 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false,
    hovermode: "x unified",
    hoverdistance: 12,
    hoverlabel: { font: { size: 11 }, namelength: 40 },
    modebar: { bgcolor: "rgba(0,0,0,0)" },
    dragmode: touch ? false : "zoom",
    xaxis: {
      title: { text: "step", standoff: 4 },
      tickformat: ",d",
      showspikes: true,
      spikemode: "across",
      spikethickness: 1,
      spikedash: "solid",
      spikecolor: "#8a8f98",
      unifiedhovertitle: { text: "step %{x:,.0f}" },
      zeroline: false,
      automargin: true,
    },
    yaxis: { automargin: true, exponentformat: "e", minexponent: 5, separatethousands: true, zerolinewidth: 1.5 },
  };
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    displayModeBar: !touch,
    scrollZoom: false,
  };

  // drawn in pixels of the screen; on paper the picture as a whole takes the width there is
  function scalable(plot) {
    for (const svg of plot.querySelectorAll("svg.main-svg"))
      svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
  }

  // a stretch of steps that is looked at in one chart is looked at in all
  function follow(from, change) {
    if (moving) return;
    let update = null;
    if (change["xaxis.autorange"]) update = { "xaxis.autorange": true, "yaxis.autorange": true };
    else if (change["xaxis.range[0]"] !== undefined)
      update = { "xaxis.range": [change["xaxis.range[0]"], change["xaxis.range[1]"]] };
    if (update === null) return;
    moving = true;
    Promise.all(plots.filter((plot) => plot !== from).map((plot) => Plotly.relayout(plot, update))).finally(() => {
      moving = false;
    });
  }

  // the runs and kinds of a plot's traces, in the order of tracesOf
  function kindsOf(chart) {
    const rows = chart.traces.map((trace) => ({ run: trace.run, trend: false, pales: Boolean(trace.trend) }));
    return rows.concat(
      chart.traces.filter((trace) => trace.trend).map((trace) => ({ run: trace.run, trend: true, pales: false }))
    );
  }

  function redraw() {
    const trend = document.getElementById("trend").checked;
    data.charts.forEach((chart, number) => {
      const kinds = kindsOf(chart);
      Plotly.restyle(plots[number], {
        visible: kinds.map((kind) => shown[kind.run] && (trend || !kind.trend)),
        opacity: kinds.map((kind) => (trend && kind.pales ? 0.3 : 1)),
      });
    });
  }

  for (const chart of data.charts) {
    const plot = document.getElementById("chart-" + chart.id);
    Plotly.newPlot(plot, tracesOf(chart), structuredClone(layout), config);
    plot.on("plotly_afterplot", () => scalable(plot));
    scalable(plot);
    plot.on("plotly_relayout", (change) => follow(plot, change));
    plots.push(plot);
  }
  for (const button of document.querySelectorAll("button.run"))
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run);
      shown[run] = !shown[run];
      button.setAttribute("aria-pressed", String(shown[run]));
      redraw();
    });
  document.getElementById("trend").addEventListener("change", redraw);
  document.documentElement.dataset.drawn = String(plots.length);
})();
