() => {
  // The address carries what is shown, so that a copied link opens it. On the Hub the page is in a frame: tell it.
  window.showInLink = changes => {
    const query = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") query.delete(name);
      else query.set(name, value);
    }
    history.replaceState(null, "", "?" + query.toString() + location.hash);
    if (window.parent !== window) {
      window.parent.postMessage({ queryString: query.toString(), hash: location.hash }, "https://huggingface.co");
    }
  };
}
