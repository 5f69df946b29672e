() => {
  // The address carries what is shown, so that a copied link opens it, and going back opens what was there before.
  // On the Hub the page is in a frame: tell it.
  window.showInLink = (changes, newStep = false) => {
    const query = new URLSearchParams(location.search);
    const before = query.toString();
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") query.delete(name);
      else query.set(name, typeof value === "number" ? Math.round(value) : value);
    }
    if (query.toString() === before) return;
    const address = "?" + query.toString() + location.hash;
    if (newStep) history.pushState(null, "", address);
    else history.replaceState(null, "", address);
    if (window.parent !== window) {
      window.parent.postMessage({ queryString: query.toString(), hash: location.hash }, "https://huggingface.co");
    }
  };
  window.addEventListener("popstate", () => location.reload());
}
