"""Settings of the stage `prepare`."""

from typing import Any, Literal

from bloomery.config import RUN_ONLY, Config, Field, TokenizerDir
from bloomery.data import quality
from bloomery.data.dataset import check_source_name
from bloomery.data.decontaminate import DecontaminateConfig
from bloomery.data.dedup import MinHashConfig
from bloomery.data.executor import ExecutorConfig
from bloomery.data.filters import FilterConfig
from bloomery.data.math_filters import MathFilterConfig
from bloomery.data.pieces import PART_BYTES
from bloomery.data.quality import QualityConfig
from bloomery.data.sources import AnySource
from bloomery.errors import ConfigError


class PrepareConfig(Config):
    """Read, filter and deduplicate sources, and sort them by quality."""

    kind: Literal["documents", "messages", "prompts"] = Field(description="what the rows are")
    sources: list[AnySource] = Field(
        description="raw sources; of equal texts in two of them, the first keeps it", min_length=1
    )
    filters: FilterConfig = Field(
        default=FilterConfig(), description="filters of every source that names none of its own"
    )
    math: MathFilterConfig | None = Field(
        default=None, description="filters for math problems with a short, checkable answer (prompts)"
    )
    deduplicate: bool = Field(default=True, description="drop texts seen before, in this source or an earlier one")
    near_duplicates: MinHashConfig | None = Field(
        default=None, description="drop texts that nearly equal one kept before, in this source or an earlier one"
    )
    language: bool = Field(default=False, description="write each text's language into its metadata, and count them")
    quality: QualityConfig | None = Field(default=None, description="sort documents into quality tiers")
    tokenizer: TokenizerDir | None = Field(default=None, description="tokenizer that counts the tokens of every source")
    instruction: str | None = Field(
        default=None, description="text behind every question, after an empty line; no filter sees it (prompts)"
    )
    decontaminate: DecontaminateConfig | None = Field(
        default=None, description="drop what shares a run of words with an item of these benchmarks"
    )
    executor: ExecutorConfig = Field(
        default=ExecutorConfig(),
        description="where the work is done; the result is the same",
        json_schema_extra=RUN_ONLY,
    )
    part_bytes: int = Field(
        default=PART_BYTES,
        description="input read as one piece of work, in bytes; the result is the same",
        gt=0,
        json_schema_extra=RUN_ONLY,
    )

    @property
    def tiered(self) -> list[str]:
        """Names of the sources that are sorted into quality tiers."""
        if self.quality is None:
            return []
        return [source.name for source in self.sources] if self.quality.sources is None else self.quality.sources


def check(config: PrepareConfig) -> dict[str, Any]:
    """What the stage would refuse before reading any data."""
    seen: set[str] = set()
    for source in config.sources:
        check_source_name(source.name)
        if source.name in seen:
            raise ConfigError(
                f"sources: {source.name} is given twice; its files would overwrite each other; rename one"
            )
        seen.add(source.name)
        source.check_kind(config.kind)
    if config.math is not None and config.kind != "prompts":
        raise ConfigError(f"math: these filters read a question and its answer; kind {config.kind} has none; remove it")
    if config.instruction is not None and config.kind != "prompts":
        raise ConfigError(f"instruction: goes behind a question; kind {config.kind} has none; remove it")
    if config.quality is not None:
        quality.check(config.quality, [source.name for source in config.sources])
        for clash in sorted({f"{name}-{tier}" for name in config.tiered for tier in config.quality.shares} & seen):
            raise ConfigError(f"sources: {clash} is also the name of a quality tier; rename the source")
    return {"kind": config.kind, "sources": sorted(seen)}
