// A client of the Llama 2 API over fetch, as a program has it.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Client {
  constructor(url, key) {
    this.url = `${url}/v1/getData`;
    this.headers = { "Ocp-Apim-Subscription-Key": key, "Content-Type": "application/json" };
  }

  async ask(prompt, attempts = 3) {
    const reply = await this.#post({ prompt });
    if (reply.status === 429 && attempts > 1) {
      await reply.body?.cancel();
      await new Promise((done) => setTimeout(done, 1000 * Number(reply.headers.get("retry-after"))));
      return this.ask(prompt, attempts - 1);
    }
    const answer = await reply.json();
    if (!reply.ok) throw new ApiError(reply.status, answer.message);
    return answer.response;
  }

  async *stream(prompt) {
    const reply = await this.#post({ prompt, stream: true });
    let rest = "";
    for await (const part of reply.body.pipeThrough(new TextDecoderStream())) {
      const events = (rest + part).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        yield JSON.parse(data).response;
      }
    }
    throw new ApiError(null, "the stream was cut");
  }

  #post(body) {
    return fetch(this.url, { method: "POST", headers: this.headers, body: JSON.stringify(body) });
  }
}
