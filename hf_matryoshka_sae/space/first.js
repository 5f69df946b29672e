// The first screen: how many latents keep how much of the loss, a sentence coloured by latent, the picture of the
// prefixes. All of it is drawn from what the server sent once, so that moving the width asks the server nothing.
() => {
  const text = (tag, words, name = "") => {
    const made = document.createElement(tag);
    made.textContent = words;
    if (name) made.className = name;
    return made;
  };
  const whole = value => value.toLocaleString("en");
  const share = value => `${value.toFixed(value > 99 ? 2 : 1)}%`;

  // An element that is drawn anew when one of the page's events says that what it shows has changed.
  class Live extends HTMLElement {
    static events = [];
    static get observedAttributes() {
      return ["data-given"];
    }
    connectedCallback() {
      this.again = () => this.update();
      for (const name of this.constructor.events) document.addEventListener(name, this.again);
      this.update();
    }
    disconnectedCallback() {
      for (const name of this.constructor.events) document.removeEventListener(name, this.again);
    }
    attributeChangedCallback(name, before) {
      if (before === null) return;
      this.read = this.at = null;
      setTimeout(() => this.update());  // once Gradio, which changes elements rather than making them anew, is done
    }
    get given() {
      return (this.read ??= JSON.parse(this.dataset.given || "null"));
    }
    get width() {
      return Number(document.body.dataset.width) || nested.latents;
    }
  }

  // What is measured, by width: {latents, prefixes, rows, tokens, ...}. It shows nothing itself.
  class Curve extends Live {
    update() {
      const given = this.given;
      if (!given) return;
      if (given.first) nested.key = given.key;
      else if (given.key !== nested.key) return;  // of a ranking or an SAE that is left
      const kept = given.rows.some(row => row.recaptured_zero != null)
        ? row => 100 * row.recaptured_zero : row => 100 * (1 - row.fvu);
      const of = given.rows.some(row => row.recaptured_zero != null) ? "loss" : "variance";
      const rows = given.rows.filter(row => Number.isFinite(kept(row)) && row.fvu != null);
      nested.curve = { ...given, of, rows: rows.map(row => ({ tokens: given.tokens, ...row, kept: kept(row) })) };
      document.dispatchEvent(new CustomEvent("curve"));
    }
  }
  customElements.define("nested-curve", Curve);

  // The two measured rows around a width (one twice where it was measured itself), and the value between them.
  const around = width => {
    const { rows } = nested.curve, next = rows.findIndex(row => row.width >= width);
    if (next < 0 || (next === 0 && rows[0].width !== width)) return null;
    const to = rows[next], from = to.width === width ? to : rows[next - 1];
    const part = from === to ? 0 : Math.log(width / from.width) / Math.log(to.width / from.width);
    return { from, to, measured: from === to, kept: from.kept + part * (to.kept - from.kept) };
  };

  // The smallest width that keeps so much, on straight lines between measured widths.
  const widthFor = target => {
    const { rows } = nested.curve, n = rows.findIndex(row => row.kept >= target);
    if (n < 0) return null;
    const to = rows[n], from = rows[n - 1];
    if (!from) return { width: to.width, from: null, to };
    const part = (target - from.kept) / (to.kept - from.kept);
    return { width: Math.min(to.width, Math.ceil(from.width * (to.width / from.width) ** part - 1e-9)), from, to };
  };

  class Answer extends Live {
    static events = ["curve", "width"];
    build() {
      this.sentence = text("p", "", "answer");
      this.label = text("label", "", "target");
      this.slider = document.createElement("input");
      Object.assign(this.slider, { type: "range", step: "0.1" });
      this.slider.addEventListener("input", () => this.choose(false));
      this.slider.addEventListener("change", () => {
        clearTimeout(this.resting);  // keys end with each step, so wait for the last
        this.resting = setTimeout(() => this.choose(true), 300);
      });
      this.here = text("p", "", "here");
      this.chart = document.createElement("nested-chart");
      this.chart.setAttribute("role", "img");
      this.append(this.sentence, this.label, this.here, this.chart);
    }
    choose(done) {
      nested.target = Number(this.slider.value);
      const found = widthFor(nested.target);
      if (found) nested.set("width", found.width, done);
      this.update();
    }
    update() {
      const curve = nested.curve;
      if (!curve) return;
      if (!this.sentence) this.build();
      const { rows, latents, of } = curve, enough = rows.length > 1;
      this.classList.toggle("unknown", !enough);
      if (!enough) {
        this.sentence.textContent = `How many of ${whole(latents)} latents keep 95% of the ${of}? Nobody has measured it yet.`;
        this.label.hidden = this.here.hidden = this.chart.hidden = true;
        return;
      }
      this.label.hidden = this.here.hidden = this.chart.hidden = false;
      const most = Math.max(...rows.map(row => row.kept)), least = Math.min(...rows.map(row => row.kept));
      const start = most >= 95 ? 95 : 5 * Math.floor(most / 5);
      const low = Math.floor(least), high = Math.floor(most * 10) / 10;
      const target = (this.target = Math.min(Math.max(nested.target ?? start, low), high));
      if (this.slider.min !== String(low) || this.slider.max !== String(high)) {
        Object.assign(this.slider, { min: String(low), max: String(high) });
      }
      if (document.activeElement !== this.slider || this.slider.value === "") this.slider.value = target;
      const { width, from, to } = widthFor(target), exact = width === to.width;
      this.sentence.replaceChildren(
        text("b", whole(width)), ` of ${whole(latents)} latents keep `, text("b", `${target.toFixed(1).replace(".0", "")}%`),
        ` of the ${of}`,
      );
      const how = exact ? (from ? "Measured." : "The smallest width that was measured.")
        : `Read between the measured widths ${whole(from.width)} and ${whole(to.width)}.`;
      this.label.replaceChildren(`Keep at least `, this.slider, text("small", how));
      this.tell(of);
      this.draw(curve);
    }
    // What the page's width keeps, and what one more latent would add.
    tell(of) {
      const found = around(this.width), { rows } = nested.curve;
      if (!found) {
        this.here.textContent = `Width ${whole(this.width)} is below the smallest that was measured, ${whole(rows[0].width)}.`;
        return;
      }
      const { from, to, measured, kept } = found;
      const after = rows[rows.indexOf(to) + (measured ? 1 : 0)], before = measured ? to : from;
      const words = [text("b", `The first ${whole(this.width)}`), ` keep ${measured ? "" : "about "}`, text("b", share(kept)), ` of the ${of}`];
      if (after) {
        const buys = (after.kept - before.kept) / (after.width - before.width);
        words.push(`; one more latent ${buys > 0 ? `adds about ${buys.toPrecision(2)} percentage points` : "adds nothing"}.`);
      } else words.push(", which is all there are.");
      this.here.replaceChildren(...words);
    }
    draw({ rows, latents, prefixes, of }) {
      const key = JSON.stringify([rows, this.target]);
      if (key === this.drawn) return;
      this.drawn = key;
      const notes = rows.map(row => `${whole(row.width)}: ${share(row.kept)}, FVU ${row.fvu.toFixed(3)}`);
      const low = Math.min(90, Math.floor(Math.min(...rows.map(row => row.kept)) / 10) * 10);
      this.chart.setAttribute("aria-label", `Share of the ${of} kept by width: ${notes.join("; ")}`);
      this.chart.spec = {
        x: { label: "width (latents)", log: true, low: rows[0].width, high: latents },
        y: { label: `${of} kept`, unit: "%", low, high: 100 },
        series: [{ name: "", points: rows.map(row => [row.width, row.kept]), notes }],
        prefixes: prefixes.length > 1 ? prefixes.filter(prefix => prefix >= rows[0].width) : [],
        target: this.target, follow: true, pick: true,
      };
    }
  }
  customElements.define("nested-answer", Answer);

  const FIGURES = [
    ["loss kept: 1 is the model alone, 0 is zeros in this place", "recaptured_zero", 4],
    ["loss kept, against the mean in this place", "recaptured_mean", 4],
    ["cross-entropy, nats per token", "ce", 4],
    ["KL to the plain model, nats", "kl", 4],
    ["cosine of pooled embeddings with the model's own", "pooled_cosine", 4],
    ["nearest neighbours of embeddings that stay", "neighbours", 4],
    ["FVU: variance left unexplained", "fvu", 4],
    ["L0: latents that fire per token", "l0", 2],
    ["RSA: similarities kept (Spearman)", "rsa", 4],
    ["latents that never fire", "dead", 4],
    ["size in MB", "size_mb", 2],
    ["held-out tokens", "tokens", 0],
  ];

  // What was measured at the page's width, beside the whole.
  class Figures extends Live {
    static events = ["curve", "width"];
    update() {
      const curve = nested.curve;
      if (!curve) return;
      const here = curve.rows.find(row => row.width === this.width), all = curve.rows.find(row => row.width === curve.latents);
      document.body.classList.toggle("measured", Boolean(here));
      if (!here) {
        this.replaceChildren(text("p", `Width ${whole(this.width)} has not been measured yet.`, "quiet"));
        return;
      }
      const table = document.createElement("table"), head = table.createTHead().insertRow();
      const columns = here === all ? [here] : [here, all].filter(Boolean);
      for (const name of ["measured", ...columns.map(row => (row === all ? `all ${whole(row.width)}` : `first ${whole(row.width)}`))]) {
        head.append(Object.assign(text("th", name), { scope: "col" }));
      }
      const body = table.createTBody();
      for (const [title, name, digits] of FIGURES) {
        if (here[name] == null) continue;
        const row = body.insertRow();
        row.append(Object.assign(text("th", title), { scope: "row" }));
        for (const column of columns) row.append(text("td", column[name] == null ? "–" : digits ? column[name].toFixed(digits) : whole(column[name]), "number"));
      }
      const { tokens } = here, selection = here.selection ?? curve.selection;
      const parts = [table, text("p", `Measured at ${curve.hookpoint}, ${curve.about}.`, "quiet")];
      if (curve.command) {
        const line = text("p", "The same from the shell: ", "quiet");
        line.append(text("code", `${curve.command} --widths ${this.width} --tokens ${tokens} --selection ${selection}`));
        parts.push(line);
      }
      this.replaceChildren(...parts);
    }
  }
  customElements.define("nested-figures", Figures);

  // A sentence at the widths that are stored: each token in the colour of its strongest latent.
  class Sample extends Live {
    static events = ["width"];
    update() {
      const sample = this.given;
      if (!sample) return;
      const fitting = sample.widths.filter(width => width <= this.width).length - 1, at = Math.max(0, fitting);
      if (this.at === at && this.childElementCount) return;
      this.at = at;
      const sentence = text("p", "", "tokens");
      sample.tokens.forEach((token, n) => {
        const firing = sample.firings[at][n];
        if (!firing.length) return sentence.append(text("span", token));
        const [latent, value] = firing[0];
        const made = Object.assign(text("button", token, "token"), { type: "button" });
        made.dataset.latent = latent;
        made.style.setProperty("--hue", nested.hue(latent));
        made.style.setProperty("--share", Math.min(1, value / (sample.largest[latent] || value)).toFixed(2));
        made.title = firing.map(([one, much]) => `${one} ${sample.labels[one] ?? ""}: ${much.toPrecision(3)}`).join("\n");
        sentence.append(made);
      });
      const parts = [sentence, text("p", `Each token in the colour of the latent that fires most on it, of the first ${whole(sample.widths[at])}. Click one to open it.`, "quiet")];
      if (sample.continuations) {
        const list = document.createElement("dl");
        const pairs = [["The model goes on", sample.plain], [`and with ${whole(sample.widths[at])} latents`, sample.continuations[at]]];
        for (const [name, words] of pairs) list.append(text("dt", name), text("dd", (words ?? "").trim() || "(nothing)", "tokens"));
        parts.push(list);
      }
      this.replaceChildren(...parts);
    }
  }
  customElements.define("nested-sample", Sample);

  // The picture of the prefixes: blocks past the width are dimmed.
  class Picture extends Live {
    static events = ["width"];
    update() {
      const kept = this.given && new Set(this.given);  // of two prunings; else those of the page's width
      for (const block of this.querySelectorAll("a.block")) {
        const latent = Number(block.dataset.latent);
        block.classList.toggle("dim", kept ? !kept.has(latent) : latent >= this.width);
      }
    }
  }
  customElements.define("nested-picture", Picture);

  // What the server said of one width: hidden as soon as the page is at another.
  class Of extends Live {
    static events = ["width"];
    update() {
      this.hidden = this.given !== this.width;
    }
  }
  customElements.define("nested-of", Of);
}
