// Browsers refuse workers to pages that are opened from a folder. There, the site's search runs in a hidden frame
// instead: it gets what a worker has, `postMessage`, `message` events and `importScripts`.
if (location.protocol === "file:") {
  const load = (frame, url) =>
    new Promise((resolve, reject) => {
      const script = frame.contentDocument.createElement("script");
      Object.assign(script, { src: url, onload: resolve, onerror: () => reject(new Error(`cannot load ${url}`)) });
      frame.contentDocument.head.append(script);
    });

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise((resolve) => document.body.append(frame) ?? resolve()).then(() => {
        this.inside = frame.contentWindow;
        this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        this.inside.importScripts = async (...urls) => {
          for (const each of urls) await load(frame, each);
        };
        return load(frame, url);
      });
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })));
    }
  };
}
