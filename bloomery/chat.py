"""A conversation with a model folder: chat template in, text out."""

from pathlib import Path

from bloomery.data.chat import encode_prompt, stop_token_ids
from bloomery.errors import ConfigError
from bloomery.generate import Engine, Request, SamplingParams
from bloomery.model import hf
from bloomery.train.model_folder import open_model, placed


class Conversation:
    """Keeps the turns and answers the next one. Raises `ConfigError` when they no longer fit the context."""

    def __init__(self, path: Path, *, max_new_tokens: int, temperature: float, seed: int):
        folder = open_model(path)
        self.tokenizer, self.window = folder.tokenizer, folder.config.max_position_embeddings
        self.engine = Engine(placed(hf.load(folder.path)), max_batch=1, max_tokens=self.window)
        self.stop = tuple(stop_token_ids(self.tokenizer))
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.messages: list[dict[str, str]] = []

    def ask(self, question: str) -> str:
        """The model's answer to one more user turn."""
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = encode_prompt(self.tokenizer, messages)
        room = self.window - len(prompt)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(prompt)} tokens, the model reads {self.window}; start a new one"
            )
        params = SamplingParams(
            max_new_tokens=min(self.max_new_tokens, room), temperature=self.temperature,
            seed=self.seed + len(messages), stop_token_ids=self.stop,
        )  # fmt: skip
        [completion] = self.engine.generate([Request(prompt, params)])
        ids = completion.token_ids
        answer = self.tokenizer.decode(ids[:-1] if ids[-1] in self.stop else ids)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer
