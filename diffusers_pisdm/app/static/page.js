// What concerns the whole page, run once it is loaded.
() => {
  // A file dropped anywhere, but for what takes files itself, goes to the button that reads recipes.
  const recipeInput = () => document.querySelector("#recipe input[type=file]");
  const isForRecipes = (event) =>
    [...(event.dataTransfer?.types || [])].includes("Files") && !event.target.closest?.("#own-picture") && recipeInput();
  window.addEventListener("dragover", (event) => { if (isForRecipes(event)) event.preventDefault(); });
  window.addEventListener("drop", (event) => {
    if (!isForRecipes(event)) return;
    event.preventDefault();
    const input = recipeInput();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
  // On a phone, the pictures are below what starts them.
  document.addEventListener("click", (event) => {
    const start = innerWidth < 780 && event.target.closest?.("#draw, #surprise, #enlarge");
    if (start) {
      const lines = document.querySelector(start.id === "enlarge" ? "#own-lines" : "#lines");
      lines.scrollIntoView({ behavior: "smooth", block: "end" });
    }
  });
}
