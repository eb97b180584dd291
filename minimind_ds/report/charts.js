/* Draws the charts of a report with BokehJS.  Their numbers are the JSON of #numbers (minimind_ds/report/curves.py);
   colours are page.css's, so that they follow the reader's light or dark. */
(() => {
  "use strict";
  const curves = JSON.parse(document.getElementById("numbers").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const several = curves.some((curve) => curve.lines.some((line) => line.run > 0));
  const wide = matchMedia("(pointer: fine)").matches;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const font = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
  let views = [];

  const told = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
    : value === 0 ? "0" : Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));

  const steps = curves.flatMap((curve) => curve.lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]));
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const room = Math.max((last - first) * 0.02, 0.5);

  function highest(curve) {
    if (curve.stacked) return Math.max(...curve.lines[0].y.map((_, at) => curve.lines.reduce((sum, line) => sum + line.y[at], 0)));
    return curve.lines.reduce((most, line) => Math.max(most, ...(line.high ?? line.y)), -Infinity);
  }

  function axis(one, label) {
    Object.assign(one, {
      axis_label: label, axis_label_text_font: font, axis_label_text_font_size: "12px",
      axis_label_text_font_style: "normal", axis_label_text_color: colour("--soft"), axis_label_standoff: 6,
      major_label_text_font: font, major_label_text_font_size: "12px", major_label_text_color: colour("--soft"),
      axis_line_color: colour("--line"), major_tick_line_color: colour("--line"), minor_tick_line_color: null,
      major_tick_in: 0, major_tick_out: 4,
    });
  }

  function figure(curve, range) {
    const tools = [new Bokeh.BoxZoomTool({dimensions: "width"}), new Bokeh.PanTool({dimensions: "width"}),
                   new Bokeh.ResetTool(), new Bokeh.SaveTool()];
    const top = highest(curve);
    const fig = Bokeh.Plotting.figure({
      ...(curve.from_zero ? {y_range: new Bokeh.Range1d({start: 0, end: top > 0 ? 1.06 * top : 1})} : {}),
      sizing_mode: "stretch_both", tools: [], x_range: range, output_backend: "canvas",
      background_fill_color: null, border_fill_color: null, outline_line_color: null, min_border: 6,
    });
    fig.toolbar.logo = null;
    fig.toolbar.autohide = true;
    fig.toolbar.tools = tools;
    // A finger scrolls the page.
    fig.toolbar.active_drag = wide ? tools[0] : null;
    axis(fig.xaxis[0] ?? fig.xaxis, "optimizer step");
    axis(fig.yaxis[0] ?? fig.yaxis, curve.unit);
    for (const grid of [fig.xgrid, fig.ygrid].flat()) grid.grid_line_color = colour("--line");
    for (const grid of [fig.xgrid].flat()) grid.grid_line_color = null;
    for (const one of [fig.xaxis].flat()) {
      one.formatter = new Bokeh.NumeralTickFormatter({format: "0,0"});
      one.ticker = new Bokeh.BasicTicker({desired_num_ticks: innerWidth < 600 ? 3 : 6, num_minor_ticks: 0, min_interval: 1});
    }
    for (const one of [fig.yaxis].flat()) {
      if (top >= 1000) one.formatter = new Bokeh.NumeralTickFormatter({format: "0,0"});
      if (top < 0.01) one.formatter = new Bokeh.BasicTickFormatter({precision: 1});
    }
    return fig;
  }

  function source(line, more = {}) {
    return new Bokeh.ColumnDataSource({data: {
      x: line.x, y: line.y, step: line.x.map((step) => step.toLocaleString("en")), told: line.y.map(told), ...more,
    }});
  }

  function hover(fig, renderers, what) {
    fig.add_tools(new Bokeh.HoverTool({renderers, mode: "vline", point_policy: "snap_to_data", line_policy: "nearest",
                                       tooltips: [["step", "@step"], [what, "@told"]]}));
  }

  function stack(fig, curve) {
    let below = curve.lines[0].x.map(() => 0);
    curve.lines.forEach((line, number) => {
      const above = below.map((value, at) => value + line.y[at]);
      const data = source(line, {below, above});
      const fill = colour(`--part-${number}`);
      fig.varea({field: "x"}, {field: "below"}, {field: "above"}, {source: data, fill_color: fill});
      // An area tells nothing under the pointer; its upper edge does.
      const edge = fig.line({field: "x"}, {field: "above"}, {source: data, line_color: fill, line_width: 1});
      hover(fig, [edge], line.kind);
      below = above;
    });
  }

  function lines(fig, curve) {
    const smooth = new Set(curve.lines.filter((line) => line.kind === "smooth").map((line) => line.run));
    for (const line of curve.lines) {
      const paint = colour(several ? `--run-${line.run}` : "--accent");
      const data = source(line, line.low ? {low: line.low, high: line.high} : {});
      if (line.low) {
        fig.varea({field: "x"}, {field: "low"}, {field: "high"}, {source: data, fill_color: paint, fill_alpha: 0.18});
      }
      if (line.kind === "points") {
        const points = fig.scatter({field: "x"}, {field: "y"}, {source: data, size: 8, line_width: 2,
          fill_color: colour("--paper"), line_color: several ? paint : colour("--ink")});
        hover(fig, [points], "evaluation");
        continue;
      }
      const faint = line.kind === "raw" && smooth.has(line.run);
      const shape = fig.line({field: "x"}, {field: "y"}, {source: data, line_color: paint, line_join: "round",
        line_width: faint ? 1 : 2, line_alpha: faint ? 0.35 : 1});
      // A run of one step is a point.
      if (line.x.length === 1) fig.scatter({field: "x"}, {field: "y"}, {source: data, size: 5, color: paint});
      if (!faint) hover(fig, [shape], curve.title.toLowerCase());
    }
  }

  // One document, so that the charts share their range: zoomed together, each in its own place.
  async function draw() {
    for (const view of views) view.remove();
    const range = new Bokeh.Range1d({start: first - room, end: last + room});
    const all = new Bokeh.Document();
    const places = curves.map((curve) => {
      const fig = figure(curve, range);
      (curve.stacked ? stack : lines)(fig, curve);
      all.add_root(fig);
      return document.getElementById(`chart-${curve.name}`);
    });
    views = Array.from(await Bokeh.embed.add_document_standalone(all, document.body, places));
    // For tests, which wait for it.
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  }

  draw();
  dark.addEventListener("change", draw);
  // A run that is linked to is opened.
  const open = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  addEventListener("hashchange", open);
  open();
})();
