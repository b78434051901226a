"""Text to token ids and back, chat rendering, and the stage that trains a byte-level BPE.

A tokenizer folder is Hugging Face's: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.config import Config, DatasetDir, Field
from bloomery.data.dataset import read_texts
from bloomery.errors import ArtifactError, ConfigError
from bloomery.progress import say

Message = Mapping[str, Any]

END, PAD = "<|endoftext|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (END, PAD, *(f"<|{role}|>" for role in ROLES))

SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "pad_token": PAD,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1_000_000_000,
}

# Two tokens a turn: who speaks, and the end. The end of a turn is the end of a document, so that one stop token
# serves the base model and the chat model, and pretraining already teaches it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message.role not in ["system", "user", "assistant", "tool"] -%}
    {{- raise_exception("unknown role " + message.role + "; choose system, user, assistant or tool") -}}
  {%- endif -%}
  {{- "<|" + message.role + "|>" -}}
  {%- if message.role == "assistant" -%}
    {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""


class Tokenizer:
    """A Hugging Face fast tokenizer without the weight of `transformers`.

    backend: the `tokenizers` object. settings: the content of `tokenizer_config.json`, kept as it was found.
    """

    def __init__(self, backend: Backend, settings: Mapping[str, Any], chat_template: str | None = None, name: str = ""):
        backend.no_truncation()  # a stored truncation would cut documents silently
        backend.no_padding()
        self.backend, self.settings, self.chat_template, self.name = backend, dict(settings), chat_template, name

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: no token is added before or after it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel threads."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the characters [start, end) of `text` it stands for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids. Bytes that are not UTF-8, as in a cut character, become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token, for messages to people."""
        return self.backend.id_to_token(token_id) or f"<id {token_id}>"

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """`eos_token`, `bos_token`, `pad_token` … → its text, as templates see them."""
        named = {name: value for name, value in self.settings.items() if name.endswith("_token") and value}
        return {name: _content(value) for name, value in named.items() if isinstance(_content(value), str)}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that the vocabulary marks as special."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        """Ends a document (and, in a chat tokenizer, usually a turn)."""
        return self._id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Starts a document, where the vocabulary has such a token."""
        return self._id("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Fills rows, never as a label; the end token where the vocabulary has none for it."""
        padding = self._id("pad_token")
        return self.eos_token_id if padding is None else padding

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself would start a document with `bos_token`."""
        first = self.backend.encode("a", add_special_tokens=True).ids[:1]
        return bool(first) and first[0] == self.bos_token_id

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, so that a table of this many rows holds every token."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The chat as one text, as `transformers` renders it. Raises `ConfigError` where the template refuses."""
        return self.render_with_spans(messages, add_generation_prompt)[0]

    def render_with_spans(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered chat, and the characters [start, end) inside each `{% generation %}` block."""
        if self.chat_template is None:
            raise ConfigError(
                f"{self.name or 'tokenizer'}: has no chat template; expected a chat_template.jinja beside it"
            )
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # annotated as `str`, it returns two lists
        try:
            rendered, spans = render(
                [[dict(message) for message in messages]],
                chat_template=self.chat_template,
                return_assistant_tokens_mask=self.marks_generation,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (TemplateError, TypeError) as error:
            raise ConfigError(f"{self.name or 'tokenizer'}: the chat template refuses this chat: {error}") from None
        return rendered[0], spans[0] if spans else []

    @property
    def marks_generation(self) -> bool:
        """Whether the template says by `{% generation %}` what the assistant writes."""
        return self.chat_template is not None and "endgeneration" in self.chat_template

    def save(self, folder: Path) -> None:
        """Write the three files; the folder loads with `transformers.AutoTokenizer`."""
        artifact.write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        settings = {name: value for name, value in self.settings.items() if name != "chat_template"}
        artifact.write_json(folder / "tokenizer_config.json", settings)
        if self.chat_template is not None:
            artifact.write_text(folder / "chat_template.jinja", self.chat_template)


def _content(token: Any) -> Any:
    """The text of a special token, which older files store as an object."""
    return token.get("content") if isinstance(token, Mapping) else token


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer or model folder. Raises `ArtifactError` naming what is missing."""
    folder = artifact.resolve(Path(path), "tokenizer")
    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 - the Rust parser raises nothing narrower
        raise ArtifactError(f"{folder / 'tokenizer.json'}: cannot be read: {error}") from None
    settings = _json_or_empty(folder / "special_tokens_map.json") | _json_or_empty(folder / "tokenizer_config.json")
    return Tokenizer(backend, settings, _chat_template(folder, settings), str(folder))


def _json_or_empty(path: Path) -> dict[str, Any]:
    return artifact.read_json(path) if path.is_file() else {}


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones: the default is the one without tools
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template


class TokenizerConfig(Config):
    """Train a byte-level BPE on dataset folders."""

    inputs: list[DatasetDir] = Field(
        description="dataset folders whose text is learnt from (documents, messages, prompts)"
    )
    vocab_size: int = Field(default=4096, description="entries wanted, special tokens and the 256 bytes included", gt=0)
    individual_digits: bool = Field(
        default=True, description="each digit is a token of its own, which arithmetic needs"
    )
    added_tokens: list[str] = Field(
        default=[], description="further texts that are one token each, such as <think>; they stay visible when decoded"
    )
    max_documents: int | None = Field(default=None, description="at most this many documents of each folder", gt=0)


def run(config: TokenizerConfig, out: Path) -> Manifest:
    """Stage `tokenizer`: learn merges from the inputs' text and save the folder."""
    with Output(out, "tokenizer", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        say(f"tokenizer  learning up to {config.vocab_size} tokens from {len(config.inputs)} folders")
        counted = _Counted(text for path in config.inputs for text in read_texts(path, config.max_documents))
        tokenizer = train_tokenizer(counted, config.vocab_size, config.individual_digits, config.added_tokens)
        if not counted.documents:
            raise ArtifactError(f"{', '.join(map(str, config.inputs))}: no text; a tokenizer needs some to learn from")
        tokenizer.save(output.path)
        if tokenizer.vocab_size < config.vocab_size:
            say(f"tokenizer  the text gave only {tokenizer.vocab_size} tokens of the {config.vocab_size} wanted")
        summary = {"vocab_size": tokenizer.vocab_size, "documents": counted.documents, "characters": counted.characters}
        return output.finish("tokenizer", summary)


class _Counted:
    """Passes texts on and counts them."""

    def __init__(self, texts: Iterable[str]):
        self._texts, self.documents, self.characters = texts, 0, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.documents += 1
            self.characters += len(text)
            yield text


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, individual_digits: bool = True, added_tokens: Sequence[str] = ()
) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2): no text is unknown, every text round-trips."""
    smallest = 256 + len(SPECIAL_TOKENS) + len(added_tokens)
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size: found {vocab_size}, expected at least {smallest}: every byte and named token")
    backend = Backend(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)] if individual_digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added_tokens),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(token, normalized=False) for token in added_tokens])
    return Tokenizer(backend, SETTINGS, CHAT_TEMPLATE)
