"""A conversation with a model folder: chat template in, text out."""

from pathlib import Path

from bloomery import artifact
from bloomery.data.chat import encode_prompt
from bloomery.data.tokenizer import load_tokenizer
from bloomery.errors import ConfigError
from bloomery.generate.engine import Engine, Request
from bloomery.generate.sampling import SamplingParams
from bloomery.model import hf


class Conversation:
    """Keeps the turns and answers the next one. Raises `ConfigError` when they no longer fit the context."""

    def __init__(self, path: Path, *, max_new_tokens: int, temperature: float, seed: int):
        folder = artifact.resolve(path, "model")
        self.tokenizer = load_tokenizer(folder)
        model = hf.load(folder)
        self.window = model.config.max_position_embeddings
        self.engine = Engine(model, max_batch=1, max_tokens=self.window)
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.messages: list[dict[str, str]] = []

    def ask(self, question: str) -> str:
        """The model's answer to one more user turn."""
        self.messages.append({"role": "user", "content": question})
        prompt = encode_prompt(self.tokenizer, self.messages)
        room = self.window - len(prompt)
        if room < 1:
            self.messages.pop()
            raise ConfigError(
                f"the conversation has {len(prompt)} tokens, the model reads {self.window}; start a new one"
            )
        params = SamplingParams(
            max_new_tokens=min(self.max_new_tokens, room), temperature=self.temperature,
            seed=self.seed + len(self.messages), stop_token_ids=tuple(self.tokenizer.stop_token_ids),
        )  # fmt: skip
        [completion] = self.engine.generate([Request(prompt, params)])
        ids = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
        answer = self.tokenizer.decode(ids)
        self.messages.append({"role": "assistant", "content": answer})
        return answer
