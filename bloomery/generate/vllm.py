"""The engine's interface over vLLM in this process (extra `vllm`, 0.20 or newer).

`VllmEngine` gives vLLM the prompts' token ids and reads token ids and log-probabilities back. Its random numbers are
vLLM's: a seed fixes a text, another text than our engine's.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from bloomery.errors import ConfigError
from bloomery.generate.request import Completion, Request

Found = Sequence[Mapping[int, Any] | None] | None


class VllmEngine:
    """Generates with vLLM from a model folder.

    max_batch: sequences at once; max_tokens: longest prompt with its completion. Further settings go to `vllm.LLM` as
    they are (`tensor_parallel_size`, `dtype`, `enable_sleep_mode` …). Raises `ConfigError` without vLLM.
    """

    def __init__(self, path: Path, max_batch: int, max_tokens: int, **settings: Any):
        self._vllm = _import()
        self.weight_version = 0
        self._llm = self._vllm.LLM(
            model=str(path), max_num_seqs=max_batch, max_model_len=max_tokens,
            logprobs_mode="processed_logprobs",  # of the distribution drawn from, as ours
            **settings,
        )  # fmt: skip

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions of `requests`, in their order."""
        completions = dict(self.stream(requests))
        return [completions[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) of each request as it finishes. Closing the iterator ends the others."""
        engine = self._llm.llm_engine
        for index, request in enumerate(requests):
            prompt = self._vllm.TokensPrompt(prompt_token_ids=list(request.prompt_ids))
            engine.add_request(str(index), prompt, self._params(request))
        left = set(map(str, range(len(requests))))
        try:
            while left:
                for output in engine.step():
                    if output.finished:
                        left.remove(output.request_id)
                        index = int(output.request_id)
                        yield index, self._completion(requests[index], output)
        finally:
            if left:
                engine.abort_request(sorted(left))

    def sync(self, weights: Mapping[str, Tensor] | Path) -> None:
        """New weights, and a new `weight_version`; what vLLM remembers of prompts is dropped.

        Tensors by the names of the model's checkpoint are handed over in this process, without a copy through disk; a
        folder is read by vLLM's workers, which is the way for `tensor_parallel_size` above 1.
        """
        if isinstance(weights, Path):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
        else:
            self._llm.apply_model(partial(_load, weights=weights))
        self._llm.reset_prefix_cache()
        self.weight_version += 1

    def sleep(self) -> None:
        """Leave the accelerator to the trainer; needs `enable_sleep_mode=True`. Weights go to the host's memory."""
        self._llm.sleep(level=1)

    def wake_up(self) -> None:
        """Back from `sleep`; call `sync` next where the trainer has changed the weights."""
        self._llm.wake_up()

    def _params(self, request: Request) -> Any:
        params = request.params
        return self._vllm.SamplingParams(
            max_tokens=max(params.max_new_tokens, 1),  # vLLM cannot only score: its one token is dropped
            temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
            stop=list(params.stop), stop_token_ids=list(params.stop_token_ids), ignore_eos=True, seed=params.seed,
            logprobs=params.top_logprobs if params.logprobs or params.top_logprobs else None,
            prompt_logprobs=params.top_logprobs if params.prompt_logprobs else None,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip

    def _completion(self, request: Request, output: Any) -> Completion:
        [written], params = output.outputs, request.params
        ids = list(written.token_ids)[: params.max_new_tokens]
        prompt = output.prompt_logprobs if params.prompt_logprobs else None
        return Completion(
            token_ids=ids, finish_reason=written.finish_reason, weight_version=self.weight_version,
            text=written.text if ids else "",
            logprobs=_chosen(ids, written.logprobs) if params.logprobs else None,  # type: ignore[arg-type]
            top_logprobs=_likeliest(written.logprobs, len(ids), params.top_logprobs),  # type: ignore[arg-type]
            prompt_logprobs=_chosen(request.prompt_ids, prompt),
            prompt_top_logprobs=_likeliest(prompt, len(request.prompt_ids), params.top_logprobs),
            cached_tokens=output.num_cached_tokens or 0,
        )  # fmt: skip


def _import() -> ModuleType:
    # In this process, so that weights can be handed over as they are; read when vLLM is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        import vllm
        import vllm.sampling_params
    except ImportError as error:
        raise ConfigError(f"vLLM cannot be imported ({error}); install it: pip install 'bloomery[vllm]'") from None
    return vllm


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    model.load_weights(iter(weights.items()))  # type: ignore[operator]


def _chosen(ids: Sequence[int], found: Found) -> list[float | None] | None:
    """The log-probability of each token; `None` where nothing comes before it."""
    if found is None:
        return None
    pairs = zip(ids, found, strict=False)
    return [None if at is None else at[token].logprob for token, at in pairs]


def _likeliest(found: Found, tokens: int, count: int) -> list[dict[int, float] | None] | None:
    """The `count` likeliest tokens at each place, likeliest first; vLLM adds the chosen one behind them."""
    if found is None or not count:
        return None
    return [None if at is None else _top(at, count) for at in found[:tokens]]


def _top(at: Mapping[int, Any], count: int) -> dict[int, float]:
    ranked = sorted(at.items(), key=lambda item: -item[1].logprob)
    return {token: found.logprob for token, found in ranked[:count]}
