// A file dropped anywhere on the page, but for places of their own, goes to the recipe's box.
() => {
  const isFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  const isElsewhere = (event) => event.target.closest?.("#own-picture, #recipe-file");
  window.addEventListener("dragover", (event) => { if (isFile(event)) event.preventDefault(); });
  window.addEventListener("drop", (event) => {
    const input = document.querySelector("#recipe-file input[type=file]");
    if (!isFile(event) || isElsewhere(event) || !input) return;
    event.preventDefault();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
}
