() => {
  // A latent in the browser: the drawer, names that the reader gave, texts coloured by latents. Everything here works on
  // what the server sent already; nothing waits.
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, attributes = {}, ...inside) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...inside);
    return element;
  };

  // Names that the reader gave, by SAE and latent, with the number that the latent had before any sorting: other tools
  // know it by that. They stay in this browser.
  const names = (window.latentNames = {
    key: () => {
      const query = new URLSearchParams(location.search);
      return `names of ${query.get("sae") || ""} ${query.get("place") || ""}`;
    },
    memory: {},
    read: () => {
      try { return JSON.parse(localStorage.getItem(names.key())) || {}; } catch { return names.memory; }
    },
    write: given => {
      names.memory = given;
      try { localStorage.setItem(names.key(), JSON.stringify(given)); } catch { /* no room, or not allowed: this visit */ }
      names.show();
    },
    show: (root = document) => {
      const given = names.read();
      if (!Object.keys(given).length) return;
      for (const named of all(".label[data-of], .naming", root)) {
        const name = given[named.dataset.of]?.name;
        if (!name) continue;
        if (named.matches("input")) named.value = name;
        else if (named.textContent !== name) named.textContent = name;
      }
    },
    // Those of a file, which the server read.
    take: () => {
      const sent = document.querySelector("[data-names]");
      if (sent) names.write({ ...names.read(), ...JSON.parse(sent.dataset.names) });
    },
    save: () => {
      const quoted = text => `"${text.replaceAll('"', '""')}"`;
      const rows = Object.values(names.read()).map(({ id, name }) => `${id},${quoted(name)}`);
      download(new Blob([["latent_id,label", ...rows].join("\n") + "\n"], { type: "text/csv" }), "names.csv");
    },
  });
  document.addEventListener("change", event => {
    const field = event.target.closest("input.naming");
    if (!field) return;
    const { [field.dataset.of]: before, ...given } = names.read();
    const name = field.value.trim(), id = Number(field.closest("[data-id]").dataset.id);
    names.write(name ? { ...given, [field.dataset.of]: { id, name } } : given);
  });
  let asked = false;
  new MutationObserver(() => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      names.show();
      // Gradio's own field for searching a table has no name but its tooltip.
      document.querySelector("#latents .search-input:not([aria-label])")?.setAttribute("aria-label", "Search the table");
    });
  }).observe(document.body, { childList: true, subtree: true });

  const download = (blob, name) => {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  document.addEventListener("click", event => {
    if (event.target.closest("[data-do=save-names]")) names.save();
  });

  // The drawer; what opened it gets the focus back.
  let opener = null;
  const drawer = (window.latentDrawer = {
    element: () => document.getElementById("drawer"),
    isOpen: () => drawer.element().classList.contains("open"),
    open: state => {
      drawer.element().setAttribute("role", "complementary");
      drawer.element().setAttribute("aria-label", "A latent");
      drawer.element().classList.toggle("open", state);
      // Beside the drawer where there is room; on a phone it is a sheet over the page.
      drawer.element().closest("main").style.paddingRight = state ? "max(0px, min(29rem, 100vw - 42rem))" : "";
    },
    openLatent: latent => {
      nested.set("latent", latent, false);
      nested.show({ latent }, true);
    },
    opening: latent => {
      const none = latent === null || latent === undefined || latent === "";
      if (none) return drawer.close();
      drawer.element().classList.add("waiting");
      drawer.open(true);
    },
    opened: latent => {
      if (latent === null || latent === undefined) return drawer.close();
      drawer.open(true);
      const element = drawer.element();
      element.classList.remove("waiting");
      element.scrollTop = 0;
      if (opener) element.querySelector("#latent-head h2")?.focus({ preventScroll: true });
      threshold(element.querySelector(".family"));
      for (const one of all("a.block.open")) one.classList.remove("open");
      for (const one of all(`a.block[data-latent="${latent}"]`)) one.classList.add("open");
    },
    close: () => {
      if (!drawer.isOpen()) return;
      drawer.open(false);
      nested.set("latent", "", false);
      nested.show({ latent: null });
      if (opener && opener.isConnected) opener.focus();
      opener = null;
    },
    // On a phone the sheet would hide what is steered.
    steering: () => {
      if (matchMedia("(max-width: 1100px)").matches) drawer.close();
      nested.show({ tab: "text" });
      document.getElementById("steering").scrollIntoView({ block: "start", behavior: "smooth" });
    },
    copyLink: async () => {
      const address = new URL(drawer.element().querySelector(".latent-head").dataset.link, location.href);
      if (nested.view.width) address.searchParams.set("width", nested.view.width);  // the family is drawn at it
      const link = address.href, button = document.getElementById("latent-link");
      try { await navigator.clipboard.writeText(link); button.textContent = "Copied"; } catch { prompt("The link:", link); }
      setTimeout(() => { button.textContent = "Copy link"; }, 2000);
    },
  });
  document.addEventListener("click", event => {
    const named = event.target.closest("[data-latent]");
    if (named && !drawer.element()?.contains(named)) opener = named;
  }, true);
  document.addEventListener("keydown", event => {
    if (event.key === "Escape" && drawer.isOpen()) drawer.close();
  });

  // The tabulator key goes from family to family of the picture; arrows go within one.
  document.addEventListener("keydown", event => {
    const block = event.target.closest?.("a.block");
    if (!block || !event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const { latent, parent } = block.dataset, picture = block.closest("svg.nested");
    const find = selector => all(selector, picture);
    const beside = parent ? find(`a.block[data-parent="${parent}"]`) : find("a.block:not([data-parent])");
    const next = {
      ArrowDown: () => find(`a.block[data-parent="${latent}"]`)[0],
      ArrowUp: () => parent && find(`a.block[data-latent="${parent}"]`)[0],
      ArrowRight: () => beside[beside.indexOf(block) + 1],
      ArrowLeft: () => beside[beside.indexOf(block) - 1],
    }[event.key]();
    if (next) next.focus();
  });

  // Relatives below the score that is asked for are hidden.
  const threshold = family => {
    const slider = family?.querySelector("input[type=range]");
    if (!slider) return;
    const least = Number(slider.value);
    slider.nextElementSibling.textContent = least.toFixed(2);
    for (const line of all("p:not(.none)", family)) {
      for (const one of all("[data-score]", line)) one.hidden = Number(one.dataset.score) < least - 1e-9;
      line.hidden = !line.querySelector(".chip:not([hidden])");
    }
    family.querySelector(".none").hidden = Boolean(family.querySelector("[data-score]:not([hidden])"));
  };
  document.addEventListener("input", event => {
    const family = event.target.closest(".family");
    if (family) threshold(family);
  });

  // What the server said, if it is of what is asked for by now. Text says itself what it is of; of steering it is counted
  // how often its controls changed.
  let changes = 0, asked_at = 0;
  nested.fitting = (said, asked) => {
    const of = new DOMParser().parseFromString(said || "", "text/html").body.firstElementChild?.dataset.of;
    return of === undefined || of === asked ? said : "";
  };
  nested.changed = () => { changes += 1; return ""; };
  nested.asked = inputs => { asked_at = changes; return inputs; };
  nested.answered = said => asked_at === changes ? said : "";

  // Texts coloured by latents. What a text's tokens fire is in its `data-reading`.
  const known = new WeakMap();
  const read = reading => {
    if (!known.has(reading)) {
      const data = JSON.parse(reading.dataset.reading);
      known.set(reading, { ...data, at: 0, limit: Infinity, pinned: null, latent: null });
      known.get(reading).at = place(data.widths, Number(document.body.dataset.width) || Infinity);
    }
    return known.get(reading);
  };
  const place = (widths, width) => Math.max(0, widths.findLastIndex(one => one <= width));
  const firing = (state, number) => state.firings[state.at][number].filter(([latent]) => latent < state.limit);
  const share = (state, latent, value) => Math.min(1, value / (state.largest[latent] || value || 1));

  const colour = reading => {
    const state = read(reading);
    all(".tok", reading).forEach((token, number) => {
      const fires = firing(state, number);
      const chosen = state.latent === null ? fires[0] : fires.find(([latent]) => latent === state.latent);
      token.style.setProperty("--share", chosen ? share(state, ...chosen).toFixed(2) : 0);
      if (chosen) token.style.setProperty("--hue", nested.hue(chosen[0]));
      token.setAttribute("aria-pressed", state.pinned === number);
    });
    const written = reading.querySelector(".goes-on");
    if (written && state.continuations) written.textContent = state.continuations[state.at];
  };

  const tell = (reading, number) => {
    const state = read(reading), fires = firing(state, number);
    const text = all(".tok", reading)[number].textContent;
    const told = reading.querySelector(".told");
    const chips = fires.slice(0, 8).map(([latent, value]) => {
      const label = make("span", { class: "label", "data-of": latent }, state.labels[latent] || "");
      return make("button", { type: "button", class: "chip", "data-choose": latent,
        "aria-pressed": state.latent === latent, title: "colour the text by this latent, and steer it" },
        String(latent), " ", label, " ", make("small", {}, value.toPrecision(3)));
    });
    told.replaceChildren(make("span", {}, `“${text.trim() || text}” `), ...(chips.length ? chips : ["no latent fires"]));
    if (state.latent !== null) {
      told.append(make("a", { class: "chip", href: "?latent=" + state.latent, "data-latent": state.latent },
        `open ${state.latent}`));
      told.append(make("button", { type: "button", class: "chip", "data-choose": "" }, "all colours"));
    }
  };

  const at = (event, act) => {
    const token = event.target.closest?.(".reading .tok");
    if (!token) return;
    const reading = token.closest(".reading");
    act(reading, all(".tok", reading).indexOf(token), token);
  };
  const point = event => at(event, (reading, number) => {
    if (read(reading).pinned === null) tell(reading, number);
  });
  document.addEventListener("pointerover", point);
  document.addEventListener("focusin", point);

  const choose = (reading, latent) => {
    const state = read(reading);
    state.latent = latent;
    colour(reading);
    if (state.pinned !== null) tell(reading, state.pinned);
    if (latent !== null) nested.set("steer-latent", latent, false);
  };
  document.addEventListener("click", event => {
    at(event, (reading, number) => {
      const state = read(reading);
      state.pinned = state.pinned === number ? null : number;
      const fires = firing(state, number);
      choose(reading, state.pinned === null || !fires.length ? null : fires[0][0]);
      tell(reading, number);
    });
    const chosen = event.target.closest("[data-choose]");
    if (chosen) choose(chosen.closest(".reading"), chosen.dataset.choose === "" ? null : Number(chosen.dataset.choose));
  });
  document.addEventListener("keydown", event => at(event, (reading, number, token) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = step && all(".tok", reading)[number + step];
    if (!next) return;
    event.preventDefault();
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }));
  document.addEventListener("width", event => {
    for (const reading of all(".reading")) {
      const state = read(reading);
      state.at = place(state.widths, event.detail);
      state.limit = event.detail;
      colour(reading);
      if (state.pinned !== null) tell(reading, state.pinned);
    }
  });

  // The picture of a family: asked for at the score that the drawer shows, saved as it is or drawn on a canvas.
  drawer.card = () => {
    const head = drawer.element().querySelector(".latent-head"), slider = drawer.element().querySelector(".family input");
    return [Number(slider?.value || 0.6), new URL(head.dataset.link, location.href).href];
  };
  document.addEventListener("click", event => {
    const kind = event.target.closest("[data-save]")?.dataset.save;
    if (!kind) return;
    const svg = document.querySelector("#family-card svg"), name = `latent-${drawer.element().querySelector(".latent-head").dataset.of}`;
    const text = new XMLSerializer().serializeToString(svg);
    if (kind === "svg") return download(new Blob([text], { type: "image/svg+xml" }), `${name}.svg`);
    const image = new Image();
    image.onload = () => {
      const canvas = make("canvas", { width: 2 * svg.width.baseVal.value, height: 2 * svg.height.baseVal.value });
      const brush = canvas.getContext("2d");
      brush.fillStyle = "white";
      brush.fillRect(0, 0, canvas.width, canvas.height);
      brush.drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob(blob => download(blob, `${name}.png`));
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text.replaceAll("prefers-color-scheme:dark", "width:0"));
  });
}
