() => {
  // The one state that all views share, on the browser's side. `nested.view` is what a link to what is shown would say;
  // the address follows it, and on the Hub, where the page is in a frame, so does the frame around it.
  const OF_TAB = { q: "search", kind: "search", text: "text", ranking: "prune compare", k: "prune", other: "compare",
    other_place: "compare", other_ranking: "compare", other_width: "compare" };
  const DEFAULTS = { tab: "prune", ranking: "trained", other_ranking: "trained", other_width: 0, kind: "", k: 0, width: 0 };
  const nested = (window.nested = { view: {}, latents: 0 });

  nested.query = () => {
    const query = new URLSearchParams();
    const { view } = nested;
    for (const [name, value] of Object.entries(view)) {
      const elsewhere = OF_TAB[name] && !OF_TAB[name].split(" ").includes(view.tab || "prune");
      if ([null, undefined, "", DEFAULTS[name]].includes(value) || elsewhere) continue;
      query.set(name, typeof value === "number" ? Math.round(value) : value);
    }
    return query.toString();
  };

  // Put what has changed into the address; `newStep` makes it a step that the back button takes back.
  nested.show = (changes, newStep = false) => {
    Object.assign(nested.view, changes);
    const query = nested.query();
    if ("?" + query === (location.search || "?")) return;
    const address = (query ? "?" + query : location.pathname) + location.hash;
    if (newStep) history.pushState(null, "", address);
    else history.replaceState(null, "", address);
    if (window.parent !== window) {
      window.parent.postMessage({ queryString: query, hash: location.hash }, "https://huggingface.co");
    }
  };
  window.addEventListener("popstate", () => location.reload());

  // A latent's colour in every view, in degrees (looks/reading.py has the same): those of neighbours are far apart.
  nested.hue = latent => Math.round((latent * 137.508) % 360);

  // Say something short beside a button, and to those who hear the page.
  const say = (button, words) => {
    const before = button.textContent;
    button.textContent = words;
    setTimeout(() => { button.textContent = before; }, 2000);
  };
  nested.copy = async (button, words) => {
    try {
      await navigator.clipboard.writeText(words);
      say(button, "Copied");
    } catch {
      window.prompt("Copy this:", words);
    }
  };
  const toggle = (name, open) => {
    document.body.classList.toggle(`open-${name}`, open);
    const button = document.querySelector(`[data-toggle=${name}]`);
    button?.setAttribute("aria-expanded", document.body.classList.contains(`open-${name}`));
  };
  document.addEventListener("click", event => {
    const button = event.target.closest("[data-share], [data-toggle]");
    if (!button) return;
    if (button.dataset.toggle) toggle(button.dataset.toggle);
    else nested.copy(button, location.href);
  });

  // An SAE was opened: nothing of the one before stays in the link.
  nested.opened = view => {
    const first = !nested.latents, { tab } = nested.view;
    toggle("another", false);
    nested.latents = view.latents;
    nested.view = {};
    const fields = {};
    for (const [name, value] of Object.entries(view)) {
      if (["default", "time", "latents", "index_tokens"].includes(name)) continue;
      if (name === "sae" && value === view.default) continue;
      fields[name] = value;
    }
    if (!first) fields.tab = tab;
    nested.show(fields, !first);
    nested.chooseWidth(view.width || view.latents);
  };

  class Opened extends HTMLElement {
    static get observedAttributes() {
      return ["data-given"];
    }
    attributeChangedCallback() {
      nested.opened(JSON.parse(this.dataset.given));
    }
  }

  // The width that all views are at: each listens for "width" and shows what it knows of it without asking the server.
  nested.chooseWidth = width => {
    document.body.dataset.width = width;
    document.dispatchEvent(new CustomEvent("width", { detail: width }));
    nested.show({ width: width === nested.latents ? null : width });
  };

  // Set a field of Gradio's as somebody at the keyboard would. `done` ends it, as letting a slider go does.
  nested.set = (id, value, done = true) => {
    const field = document.querySelector(`#${id} input`);
    if (!field) return;
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    if (done) field.dispatchEvent(new Event("pointerup", { bubbles: true }));
  };

  // Follow the link of a download button that is not to be seen.
  nested.download = id => document.querySelector(`#${id} a, a#${id}, #${id} button, button#${id}`)?.click();

  // Gradio's tables name their search field by a title alone.
  new MutationObserver(() => {
    const unnamed = document.querySelectorAll("input.search-input:not([aria-label])");
    for (const field of unnamed) field.setAttribute("aria-label", field.title);
  }).observe(document.body, { childList: true, subtree: true });

  // A click on anything that names a latent opens it; in a new tab or with a key held, a link stays a link.
  document.addEventListener("click", event => {
    const named = event.target.closest("[data-latent]");
    if (!named || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    nested.set("latent", named.dataset.latent, false);
    nested.show({ latent: Number(named.dataset.latent) }, true);
  });

  // Keys move a slider; letting the key go is what letting the pointer go is.
  document.addEventListener("keyup", event => {
    const moves = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End"];
    const slider = event.target.closest("input[type=range]");
    const number = event.target.closest("input[data-testid=number-input]");
    if ((slider && moves.includes(event.key)) || (number && event.key === "Enter")) {
      event.target.dispatchEvent(new Event("pointerup", { bubbles: true }));
    }
  });

  customElements.define("nested-opened", Opened);
}
