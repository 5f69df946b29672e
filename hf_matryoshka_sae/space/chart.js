// <nested-chart data-spec="{...}">: lines as SVG, in the page's colours and at the size the screen gives it.
// looks/charts.py writes the specification and, in words, what the chart shows.
() => {
  const LEFT = 54, RIGHT = 14, TOP = 14, BOTTOM = 42;
  const SVG = "http://www.w3.org/2000/svg";

  const element = (name, attributes = {}, text = null) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) {
      made.setAttribute(key, typeof value === "number" ? value.toFixed(1) : value);
    }
    if (text !== null) made.textContent = text;
    return made;
  };

  const written = value => {
    const size = Math.abs(value);
    if (size && (size >= 1e6 || size < 1e-3)) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
    return size < 1e4 ? Number(value.toPrecision(4)).toLocaleString("en") : Math.round(value).toLocaleString("en");
  };

  // From values to places in the drawing.
  const scale = (axis, values, start, stop) => {
    let low = axis.low ?? Math.min(...values), high = axis.high ?? Math.max(...values);
    if (!(high > low)) high = axis.log ? low * 2 : low + 1;
    const on = axis.log ? Math.log : Number;
    const at = value => start + (on(Math.min(Math.max(value, low), high)) - on(low)) / (on(high) - on(low)) * (stop - start);
    const back = place => {
      const value = on(low) + (place - start) / (stop - start) * (on(high) - on(low));
      return Math.min(Math.max(axis.log ? Math.exp(value) : value, low), high);
    };
    return { at, back, low, high, ticks: ticks(axis, low, high, start < stop ? (stop - start) / 60 : (start - stop) / 36) };
  };

  // Round numbers between the ends, as many as there is room for.
  const ticks = (axis, low, high, room) => {
    const most = Math.max(2, Math.floor(room));
    const candidates = [];
    if (axis.log) {
      const powers = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) powers.push(10 ** power);
      for (const steps of [[1, 2, 5], [1, 3], [1]]) candidates.push(powers.flatMap(p => steps.map(s => s * p)));
    } else {
      const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map(s => s * power).find(s => s >= rough * 0.999);
      const count = Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1;
      candidates.push(Array.from({ length: count }, (_, n) => (Math.ceil(low / step - 1e-9) + n) * step));
    }
    const inside = candidates.map(all => all.filter(tick => tick >= low * (1 - 1e-9) - 1e-12 && tick <= high * (1 + 1e-9)));
    const chosen = inside.find(all => all.length <= most) ?? inside.at(-1);
    return chosen.length ? chosen.filter((_, n) => n % Math.ceil(chosen.length / most) === 0) : [low, high];
  };

  class Chart extends HTMLElement {
    static get observedAttributes() {
      return ["data-spec"];
    }
    attributeChangedCallback(name, before) {
      if (before === null) return;
      this.given = null;  // Gradio changes an element rather than making it anew
      setTimeout(() => this.draw());
    }
    connectedCallback() {
      this.observer = new ResizeObserver(() => this.draw());
      this.observer.observe(this);
      this.follow = () => this.mark();
      document.addEventListener("width", this.follow);
    }
    disconnectedCallback() {
      this.observer.disconnect();
      document.removeEventListener("width", this.follow);
    }
    set spec(spec) {
      this.given = spec;
      if (this.isConnected) this.draw();
    }
    get spec() {
      return (this.given ??= JSON.parse(this.dataset.spec ?? "null"));
    }

    draw() {
      const { spec } = this, width = this.clientWidth;
      if (!spec || !width) return;
      const height = spec.height ?? Math.round(Math.min(300, Math.max(200, width * 0.5)));
      this.svg = element("svg", { width: String(width), height: String(height), "aria-hidden": "true" });
      const points = spec.series.flatMap(one => one.points);
      this.x = scale(spec.x, points.map(([x]) => x), LEFT, width - RIGHT);
      this.y = scale(spec.y, points.map(([, y]) => y), height - BOTTOM, TOP);
      this.bottom = height - BOTTOM;
      this.frame(width, height);
      spec.series.forEach((one, number) => this.line(one, number));
      this.svg.append((this.moving = element("g", { class: "moving" })), (this.over = element("g", { class: "over" })));
      this.replaceChildren(this.svg, ...this.legend());
      this.mark();
      this.svg.addEventListener("pointermove", event => this.hover(event));
      this.svg.addEventListener("pointerleave", () => this.over.replaceChildren());
      if (spec.pick) this.svg.addEventListener("click", event => this.pick(event));
    }

    frame(width, height) {
      const { spec, x, y, svg, bottom } = this;
      for (const tick of y.ticks) {
        svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y.at(tick), y2: y.at(tick) }));
        svg.append(element("text", { x: LEFT - 7, y: y.at(tick) + 4, "text-anchor": "end" }, written(tick) + (spec.y.unit ?? "")));
      }
      for (const at of spec.prefixes ?? []) {
        svg.append(element("line", { class: "prefix", x1: x.at(at), x2: x.at(at), y1: TOP, y2: bottom }));
      }
      // The numbers are those of the prefixes, and round ones before the first, as far as they do not run together.
      const prefixes = spec.prefixes ?? [];
      const ticks = [...x.ticks.filter(tick => !prefixes.length || x.at(tick) < x.at(prefixes[0]) - 30), ...prefixes];
      let free = -Infinity;
      for (const tick of ticks) {
        if (x.at(tick) < free) continue;
        free = x.at(tick) + 14 + 7 * written(tick).length;
        const end = x.at(tick) > width - RIGHT - 18;
        const place = { x: end ? width - 2 : x.at(tick), y: bottom + 16, "text-anchor": end ? "end" : "middle" };
        svg.append(element("text", place, written(tick)));
      }
      svg.append(element("text", { class: "label", x: (LEFT + width) / 2, y: height - 6, "text-anchor": "middle" }, spec.x.label));
      const middle = (TOP + bottom) / 2, turned = `rotate(-90 12 ${middle})`;
      svg.append(element("text", { class: "label", x: 12, y: middle, "text-anchor": "middle", transform: turned }, spec.y.label));
      if (spec.target !== undefined) {
        const at = y.at(spec.target);
        svg.append(element("line", { class: "target", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
      }
    }

    line({ points }, number) {
      const group = element("g", { class: `series s${number}` });
      group.append(element("polyline", { points: points.map(([a, b]) => `${this.x.at(a).toFixed(1)},${this.y.at(b).toFixed(1)}`).join(" ") }));
      for (const [a, b] of points) group.append(element("circle", { cx: this.x.at(a), cy: this.y.at(b), r: 3.2 }));
      this.svg.append(group);
    }

    legend() {
      const names = this.spec.series.map(one => one.name);
      if (names.length < 2) return [];
      const legend = document.createElement("p");
      legend.className = "legend";
      names.forEach((name, number) => {
        const entry = document.createElement("span");
        entry.className = `s${number}`;
        entry.textContent = name;
        legend.append(entry);
      });
      return [legend];
    }

    // A vertical line at x, a ring on the curve, and what is there in words, inside the drawing.
    point(into, x, y, text, name) {
      const at = this.x.at(x), up = this.y.at(y), wide = this.svg.clientWidth || this.clientWidth;
      const group = element("g", { class: name });
      group.append(element("line", { x1: at, x2: at, y1: TOP, y2: this.bottom }), element("circle", { cx: at, cy: up, r: 6 }));
      // Beside the line, at the end of it that is farther from the curve.
      const end = at > wide * 0.6, low = up < (TOP + this.bottom) / 2;
      const place = { x: at + (end ? -8 : 8), y: low ? this.bottom - 8 : TOP + 10, "text-anchor": end ? "end" : "start" };
      group.append(element("text", place, text));
      into.append(group);
    }

    mark() {
      if (!this.moving) return;
      this.moving.replaceChildren();
      const { spec } = this;
      for (const { x, y, text, series } of spec.marks ?? []) this.point(this.moving, x, y, text, `mark s${series ?? 0}`);
      const width = Number(document.body.dataset.width);
      const here = spec.follow && width ? this.at(spec.series[0].points, width) : null;
      if (here !== null) {
        this.point(this.moving, width, here, `${written(width)}: ${written(here)}${spec.y.unit ?? ""}`, "mark s0");
      }
    }

    // On straight lines between the points, on the axis as it is drawn.
    at(points, x) {
      const on = this.spec.x.log ? Math.log : Number;
      const next = points.findIndex(([a]) => a >= x);
      if (next < 0 || (next === 0 && points[0][0] !== x)) return null;
      if (points[next][0] === x) return points[next][1];
      const [[a, b], [c, d]] = [points[next - 1], points[next]];
      return b + (on(x) - on(a)) / (on(c) - on(a)) * (d - b);
    }

    place(event) {
      return this.x.back(event.clientX - this.svg.getBoundingClientRect().left);
    }

    hover(event) {
      const x = this.place(event), { spec } = this;
      this.over.replaceChildren();
      spec.series.forEach(({ points, notes }, number) => {
        if (!points.length) return;
        const far = points.map(([a]) => Math.abs(this.x.at(a) - this.x.at(x)));
        const n = far.indexOf(Math.min(...far)), [a, b] = points[n];
        this.point(this.over, a, b, notes?.[n] ?? `${written(a)}: ${written(b)}${spec.y.unit ?? ""}`, `hover s${number}`);
      });
    }

    // A click is a width; one beside a prefix means the prefix.
    pick(event) {
      const x = this.place(event), { spec } = this;
      const near = (spec.prefixes ?? []).find(prefix => Math.abs(this.x.at(prefix) - this.x.at(x)) < 8);
      nested.set("width", near ?? Math.round(x));
    }
  }
  customElements.define("nested-chart", Chart);
}
