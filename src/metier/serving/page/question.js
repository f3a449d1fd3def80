/* What is asked: the form's fields as a request in OpenAI's format. */

const field = (id) => document.getElementById(id);

/** The path to ask and the request's body, the model aside. */
export function readQuestion() {
  const isChat = field("question").elements.mode.value === "chat";
  const body = {
    temperature: field("temperature").valueAsNumber,
    max_tokens: field("max-tokens").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
    metier: { experts: true },
  };
  if (field("seed").value !== "") body.seed = field("seed").valueAsNumber;
  if (!isChat) return { path: "/v1/completions", body: { ...body, prompt: field("prompt").value } };
  const messages = [{ role: "user", content: field("prompt").value }];
  if (field("system").value.trim() !== "") messages.unshift({ role: "system", content: field("system").value });
  return { path: "/v1/chat/completions", body: { ...body, messages } };
}

/** Send the form by Ctrl+Enter from anywhere in it, and show the system prompt with chat alone. */
export function watchQuestion() {
  const form = field("question");
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    form.requestSubmit();
  });
  const arrange = () => (field("system-field").hidden = form.elements.mode.value !== "chat");
  form.addEventListener("change", arrange);
  arrange();
}
