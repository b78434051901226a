"""Rows of a question-answer corpus as prompts: read, filtered, shuffled, asked in the forms wanted."""

from collections.abc import Iterable, Iterator

from bloomery.config import Field
from bloomery.data.document import Document
from bloomery.data.qa import INSTRUCTIONS, AnswerForm, Form, Item, shuffled, to_benchmark, to_prompt
from bloomery.data.qa_convert import Ambiguous, to_open
from bloomery.data.qa_filters import DAMAGED, QAFilterConfig, drop_reason, refer_to_each_other
from bloomery.data.qa_read import Layout, Tags, items
from bloomery.data.read import Invalid, Located
from bloomery.errors import ArtifactError, ConfigError

_ALWAYS_ALLOWED = 1


class QAConfig(QAFilterConfig):
    """How rows are read as questions, and asked."""

    layout: Layout = Field(
        default="columns",
        description="columns: question, options (a list, or columns A, B, …), answer, renamed by the source's "
        "`columns` · mmlu · agieval · arc · gsm8k: as these are published",
    )
    domain: str = Field(
        default="", description="domain of all rows; a column `domain` comes first, the source's name last"
    )
    domains: dict[str, str] = Field(default={}, description="subject → domain, for sources of several")
    subject: str = Field(default="", description="subject of all rows, where they have no such column")
    license: str = Field(default="", description="licence of all rows, where they have no such column")
    answer_form: AnswerForm | None = Field(
        default=None, description="how open answers are judged: short or math; where not given, numbers, formulas and "
        "the domain math are math",
    )  # fmt: skip
    forms: list[Form] = Field(
        default=[], description="forms in which each question is asked; as it was written where empty. open asks those "
        "of multiple choice without their options, where that is possible",
    )  # fmt: skip
    ambiguous: Ambiguous = Field(
        default="drop", description="an opened question whose answer is no number and no name: drop, or mark for the "
        "stage curate to try (`probe`)",
    )  # fmt: skip
    shuffle: bool = Field(default=True, description="options in random order, so that no letter is likelier")
    shuffles: int = Field(default=1, description="rows of each choice, each with its own order of options", gt=0)
    seed: int = Field(default=0, description="seed of the order of options")
    max_damaged: float = Field(
        default=0.01, description="share of damaged rows above which the source is refused; 1 allows all", ge=0, le=1
    )
    instructions: dict[Form, str] = Field(
        default=INSTRUCTIONS, description="what stands before a choice and before an open question; empty: nothing"
    )  # fmt: skip


class Questions:
    """The questions of one source."""

    def __init__(self, rows: Iterable[Located], config: QAConfig, columns: dict[str, str], name: str, invalid: Invalid):
        self.config, self.name, self.invalid, self.drops = config, name, invalid, invalid.drops
        tags = Tags(name, config.domain, config.domains, config.subject, config.license, config.answer_form)
        self._items = items(rows, config.layout, columns, tags, invalid)

    def documents(self, kind: str) -> Iterator[Document]:
        """Prompts, or the bare questions for the contamination check. Raises `ConfigError` for another kind."""
        if kind == "documents":
            return (to_benchmark(item) for _, item in self._items)
        if kind == "prompts":
            return (to_prompt(item, self.config.instructions) for item in self._asked())
        raise ConfigError(f"source {self.name}: questions give prompts, or documents to compare with, not {kind}")

    def _asked(self) -> Iterator[Item]:
        damaged = seen = 0
        for where, item in self._items:
            seen += 1
            reason = drop_reason(item, self.config)
            if reason is None:
                yield from self._in_forms(where, item)
                continue
            self.invalid(where, reason, reason) if reason in DAMAGED else self.drops.add(reason, where)
            damaged += reason in DAMAGED
        if damaged > max(_ALWAYS_ALLOWED, self.config.max_damaged * seen):
            raise ArtifactError(
                f"source {self.name}: {damaged} of {seen} rows are damaged, more than max_damaged allows "
                f"({self.config.max_damaged:.0%}); dropped: {self.drops}. Repair them, or raise it"
            )

    def _in_forms(self, where: str, item: Item) -> Iterator[Item]:
        for form in self.config.forms or [item.form]:
            if form == "choice":
                yield from self._choices(where, item)
            else:
                opened = to_open(item, self.config, self.config.ambiguous)
                if isinstance(opened, Item):
                    yield opened
                else:
                    self.drops.add(f"not asked openly: {opened}", where)

    def _choices(self, where: str, item: Item) -> Iterator[Item]:
        if item.options is None:
            self.drops.add("not asked as a choice: it has no options", where)
        elif not self.config.shuffle or refer_to_each_other(item.options):
            yield item
        else:
            yield from (shuffled(item, self.config.seed, epoch) for epoch in range(self.config.shuffles))
