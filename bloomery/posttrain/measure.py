"""How often a model solves each prompt: samples of it, judged and stored, by the engine here or by an endpoint."""

from collections.abc import Sequence
from pathlib import Path

from bloomery.data.chat import stop_token_ids
from bloomery.data.document import Drops
from bloomery.data.prompts import Prompt, load_prompts
from bloomery.generate import Engine, SamplingParams
from bloomery.generate.remote import RemoteEngine
from bloomery.model import hf
from bloomery.posttrain.measure_config import MeasureConfig
from bloomery.posttrain.rollouts import Source, roll_out
from bloomery.posttrain.traces import RolloutStore
from bloomery.progress import Bar
from bloomery.train.model_folder import ModelFolder, open_model, placed
from bloomery.verify import open_pool, self_test

_PROMPTS_PER_FILE = 256


def measure(config: MeasureConfig, dataset: Path, folder: Path, drops: Drops) -> None:
    """Write the judged samples of all prompts of `dataset` to `folder`, as rows of kind traces.

    What is there already is not sampled again, so that a cut run goes on. Prompts too long for the model are counted
    in `drops`: nobody knows their rate.
    """
    start = open_model(config.model)
    prompts = load_prompts(dataset, start.tokenizer, start.room(config.max_new_tokens), drops)
    self_test(sorted({prompt.verifier for prompt in prompts}))
    source, store = _source(config, start, prompts), RolloutStore(folder)
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        stop_token_ids=tuple(stop_token_ids(start.tokenizer)), logprobs=False,
    )  # fmt: skip
    starts = range(0, len(prompts), _PROMPTS_PER_FILE)
    with open_pool("local", config.workers, config.require_think) as pool, Bar("measure", len(starts)) as bar:
        for number, first in enumerate(starts):
            if not store.has(number):
                some = prompts[first : first + _PROMPTS_PER_FILE]
                store.write(number, roll_out(source, pool, some, config.samples, params, (config.seed, number)))
            bar.update(number + 1, f"{min(first + _PROMPTS_PER_FILE, len(prompts)):,} prompts")


def _source(config: MeasureConfig, start: ModelFolder, prompts: Sequence[Prompt]) -> Source:
    if config.endpoint is not None:
        return RemoteEngine(config.endpoint.base_url, config.endpoint.model, concurrency=config.endpoint.concurrency)
    window = max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens
    rows = min(config.max_batch, len(prompts) * config.samples)
    return Engine(placed(hf.load(start.path)), rows, window, decode=start.tokenizer.decode)
