"""The stage `evaluate`: sample answers to held-out problems, judge them, report with standard errors."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import model_validator

from bloomery import artifact
from bloomery.artifact import REPORT, SAMPLES, Manifest, Output
from bloomery.config import RUN_ONLY, Config, DatasetDir, Field, ModelDir
from bloomery.data.chat import stop_token_ids
from bloomery.data.document import Drops
from bloomery.data.prompts import Prompt, load_prompts
from bloomery.data.tokenizer import Tokenizer
from bloomery.errors import ArtifactError, BloomeryError
from bloomery.evaluate.scoring import Answer, answer_all, choose, metrics, report_rows
from bloomery.generate import Engine, SamplingParams
from bloomery.model import hf
from bloomery.train.model_folder import ModelFolder, open_model, placed
from bloomery.verify import open_pool, self_test

SCHEMA = pa.schema([
    ("task", pa.string()), ("id", pa.string()), ("source", pa.string()),
    ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("completion", pa.string()), ("answer", pa.string()), ("score", pa.float64()), ("status", pa.string()),
    ("reason", pa.string()), ("tokens", pa.int64()), ("finish_reason", pa.string()), ("sample", pa.int64()),
])  # fmt: skip


class EvaluateConfig(Config):
    """Judge a model on prompts with verifiable answers."""

    model: ModelDir = Field(description="the model to judge: a stage's folder or a Hugging Face directory")
    prompts: DatasetDir = Field(description="dataset of kind prompts; each source in it is reported as one task")
    num_samples: int = Field(default=4, gt=0, description="answers to each problem (the k of avg@k)")
    temperature: float = Field(default=1.0, ge=0, description="sampling temperature; 0 is greedy, with one sample")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability"
    )
    max_new_tokens: int = Field(default=256, gt=0, description="longest answer, tokens")
    max_problems: int | None = Field(default=None, gt=0, description="at most so many problems, chosen by the seed")
    require_think: bool = Field(default=False, description="an answer counts only behind a </think>")
    seed: int = Field(default=0, description="seed of the choice of problems and of the sampling")
    max_batch: int = Field(default=64, gt=0, description="sequences decoded at a time", json_schema_extra=RUN_ONLY)
    workers: int = Field(default=2, gt=0, description="processes that judge", json_schema_extra=RUN_ONLY)
    verify_on: Literal["local", "ray"] = Field(
        default="local", description="where they run: on this machine, or on a Ray cluster (extra ray)",
        json_schema_extra=RUN_ONLY,
    )  # fmt: skip

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.temperature == 0 and (self.num_samples > 1 or self.top_p < 1):
            raise ValueError("temperature: 0 writes the same answer each time; set num_samples 1 and leave top_p at 1")
        return self

    def sampling(self, tokenizer: Tokenizer) -> SamplingParams:
        """How answers are drawn from a model with this tokenizer."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p,
            stop_token_ids=tuple(stop_token_ids(tokenizer)), logprobs=False,
        )  # fmt: skip


def run(config: EvaluateConfig, out: Path) -> Manifest:
    """Stage `evaluate`: writes `report.json` and `samples.parquet`."""
    with Output(out, "evaluate", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        start, prompts, drops = _problems(config)
        self_test(sorted({prompt.verifier for prompt in prompts}))
        problems = _answers(config, start, prompts)
        _require_verdicts(problems)
        _write_samples(output.path / SAMPLES, problems)
        artifact.write_json(output.path / REPORT, report_rows(problems, config.max_new_tokens, config.require_think))
        return output.finish("evaluation", _summary(problems, drops, config))


def check(config: EvaluateConfig) -> dict[str, Any]:
    """What will be judged, as far as the inputs exist already."""
    try:
        start, prompts, drops = _problems(config)
    except ArtifactError as error:
        return {"samples_per_problem": config.num_samples, "inputs": str(error)}
    longest = max(len(prompt.ids) for prompt in prompts)
    return {
        "problems": len(prompts), "samples": len(prompts) * config.num_samples, "left_out": str(drops),
        "longest_prompt_tokens": longest, "first_prompt": start.tokenizer.decode(prompts[0].ids),
        "most_tokens": len(prompts) * config.num_samples * config.max_new_tokens,
    }  # fmt: skip


def _problems(config: EvaluateConfig) -> tuple[ModelFolder, list[Prompt], Drops]:
    start, drops = open_model(config.model), Drops()
    prompts = load_prompts(config.prompts, start.tokenizer, start.room(config.max_new_tokens), drops)
    return start, choose(prompts, config.max_problems, config.seed), drops


def _answers(config: EvaluateConfig, start: ModelFolder, prompts: Sequence[Prompt]) -> list[list[Answer]]:
    window = max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens
    rows = min(config.max_batch, len(prompts) * config.num_samples)
    engine = Engine(placed(hf.load(start.path)), rows, window, decode=start.tokenizer.decode)
    with open_pool(config.verify_on, config.workers, config.require_think) as pool:
        return answer_all(engine, pool, prompts, config.num_samples, config.sampling(start.tokenizer), config.seed)


def _require_verdicts(problems: Sequence[Sequence[Answer]]) -> None:
    verdicts = [answer.verdict for problem in problems for answer in problem]
    if all(verdict.score is None for verdict in verdicts):
        raise BloomeryError(
            f"the verifier could judge none of {len(verdicts)} answers; the first reason: {verdicts[0].reason}. "
            "Repair the verifier and run the same command again"
        )


def _write_samples(path: Path, problems: Sequence[Sequence[Answer]]) -> None:
    rows = [answer.row() for problem in problems for answer in problem]
    with artifact.replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)


def _summary(problems: Sequence[Sequence[Answer]], drops: Drops, config: EvaluateConfig) -> dict[str, Any]:
    estimates = metrics(problems, config.max_new_tokens, config.require_think)
    answers = [answer for problem in problems for answer in problem]
    return {
        **{name: estimate.value for name, estimate in estimates.items()},
        "problems": len(problems),
        "samples": len(answers),
        "unjudged": sum(answer.verdict.score is None for answer in answers),
        "left_out": dict(drops.counts),
        "statuses": dict(Counter(answer.verdict.status for answer in answers).most_common()),
    }
