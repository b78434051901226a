"""What writes a run's completions: the engine here, an endpoint, or vLLM, each with the trainer's weights.

Of several ranks each has an engine on a copy of the whole model, filled one tensor at a time from what the ranks hold;
an endpoint serves all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bloomery.errors import ConfigError
from bloomery.generate import Completion, Engine, Request
from bloomery.generate.remote import RemoteEngine
from bloomery.generate.vllm import VllmEngine
from bloomery.model import hf
from bloomery.model.decoder import Decoder
from bloomery.posttrain.ranks import Ranks
from bloomery.posttrain.rl_config import AnyGenerator, EndpointGenerator, VllmGenerator
from bloomery.train.loop import TrainState
from bloomery.train.model_folder import ModelFolder
from bloomery.train.spread import save_model


@dataclass(frozen=True)
class Generator:
    """`update` hands the weights over; completions after it have the new `weight_version`."""

    source: Engine | RemoteEngine | VllmEngine
    update: Callable[[], None]

    @property
    def weight_version(self) -> int:
        """That of the weights handed over last."""
        return self.source.weight_version

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) of each request as it finishes."""
        return self.source.stream(requests)


def open_generator(
    config: AnyGenerator, state: TrainState, copy: Decoder | None, start: ModelFolder, work: Path, rows: int,
    window: int, ranks: Ranks,
) -> Generator:  # fmt: skip
    """The generator of this rank, for the model that is trained. Its `update` is called by all ranks together.

    copy: of the whole model, for an engine, where `state` holds a part of it. start: the model folder that training
    starts from; work: where weights for other processes may lie; rows: sequences at a time; window: tokens of the
    longest prompt with its completion.
    """
    if isinstance(config, EndpointGenerator):
        return _endpoint(config, state, start, config.folder or work / "endpoint", ranks)
    model: Decoder = copy or state.model  # type: ignore[assignment]
    if isinstance(config, VllmGenerator):
        if state.parallel is not None:
            raise ConfigError(
                "generator.type: vllm here runs in one process only; on several ranks take engine, or endpoint with "
                "vLLM as a server"
            )
        return _vllm(config, model, start.path, work / "vllm", rows, window)
    engine = Engine(model, rows, window, decode=start.tokenizer.decode, deterministic=config.deterministic)
    parallel = state.parallel
    return Generator(engine, engine.sync if parallel is None else lambda: engine.sync(parallel.full_state()))


def _endpoint(
    config: EndpointGenerator, state: TrainState, start: ModelFolder, folder: Path, ranks: Ranks
) -> Generator:
    remote = RemoteEngine(config.base_url, config.model, concurrency=config.concurrency)

    def take() -> None:
        """The first rank tells the endpoint, the others count along."""
        if ranks.is_main:
            remote.sync(folder, config.server)
        else:
            remote.weight_version += 1

    def update() -> None:
        save_model(state, start.config, folder)
        ranks.together(take)

    return Generator(remote, update)


def _vllm(config: VllmGenerator, model: Decoder, start: Path, folder: Path, rows: int, window: int) -> Generator:
    """Weights are handed over in memory; vLLM's workers in other processes read them from `folder`."""
    engine = VllmEngine(start, rows, window, **config.settings)
    apart = config.settings.get("tensor_parallel_size", 1) > 1

    def update() -> None:
        if apart:
            hf.save(model, folder)
            engine.sync(folder)
        else:
            engine.sync(hf.published(model))

    return Generator(engine, update)
