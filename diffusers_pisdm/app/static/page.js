// What concerns the whole page, run once it is loaded.
() => {
  // A file dropped anywhere, but for what takes files itself, goes to the button that reads recipes.
  const isFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  const isElsewhere = (event) => event.target.closest?.("#own-picture");
  window.addEventListener("dragover", (event) => { if (isFile(event)) event.preventDefault(); });
  window.addEventListener("drop", (event) => {
    const input = document.querySelector("#recipe input[type=file]");
    if (!isFile(event) || isElsewhere(event) || !input) return;
    event.preventDefault();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
  // On a phone, the pictures are below what starts them.
  document.addEventListener("click", (event) => {
    if (innerWidth < 780 && event.target.closest?.("#draw, #surprise")) {
      document.querySelector("#lines").scrollIntoView({ behavior: "smooth", block: "end" });
    }
  });
}
