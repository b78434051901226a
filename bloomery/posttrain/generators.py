"""What writes a run's completions: the engine here, an endpoint, or vLLM, each with the trainer's weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bloomery.generate import Completion, Engine, Request
from bloomery.generate.remote import RemoteEngine
from bloomery.generate.stopping import Decode
from bloomery.generate.vllm import VllmEngine
from bloomery.model import hf
from bloomery.model.decoder import Decoder
from bloomery.posttrain.rl_config import AnyGenerator, EndpointGenerator, VllmGenerator


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
    config: AnyGenerator, model: Decoder, start: Path, work: Path, rows: int, window: int, decode: Decode
) -> Generator:
    """The generator for `model`, which is trained.

    start: the model folder that training starts from; work: where weights for other processes may lie; rows: sequences
    at a time; window: tokens of the longest prompt with its completion.
    """
    if isinstance(config, EndpointGenerator):
        return _endpoint(config, model, config.folder or work / "endpoint")
    if isinstance(config, VllmGenerator):
        return _vllm(config, model, start, work / "vllm", rows, window)
    engine = Engine(model, rows, window, decode=decode)
    return Generator(engine, engine.sync)


def _endpoint(config: EndpointGenerator, model: Decoder, folder: Path) -> Generator:
    remote = RemoteEngine(config.base_url, config.model, concurrency=config.concurrency)

    def update() -> None:
        hf.save(model, folder)
        remote.sync(folder, config.server)

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
