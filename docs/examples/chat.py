"""A transport: another way to reach a language model."""

import asyncio
import dataclasses
import json
import urllib.request

from dca_jax.review import CallFailed, LanguageModel, Reply, Transport


@dataclasses.dataclass(frozen=True)
class Chat(LanguageModel):
  path: str = "/v1/chat/completions"

  def connect(self, client):
    def post(body):
      address, data = client.base_url + self.path, json.dumps(body).encode()
      return json.load(urllib.request.urlopen(address, data, timeout=client.attempt_seconds))

    class Wire(Transport):
      async def __call__(self, system, user, schema, max_tokens, seed):
        said = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": client.model, "messages": said, "max_tokens": max_tokens}
        try:
          answer = await asyncio.to_thread(post, body)
          return Reply(answer["choices"][0]["message"]["content"], model=client.model)
        except (OSError, ValueError, LookupError) as error:
          raise CallFailed("connection", str(error), again=True) from None

    return Wire()
