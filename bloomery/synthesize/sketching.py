"""Gradient sketches of a whole dataset by a proxy model, block by block. Under torchrun every rank makes its own
blocks, without a word to the others; what is there already is kept.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from bloomery import artifact
from bloomery.config import Config, DatasetDir, Field, ModelDir
from bloomery.data.dataset import Row, kind_of, open_parquet, read_rows, shards
from bloomery.data.document import Drops
from bloomery.errors import ArtifactError
from bloomery.model import hf
from bloomery.model.decoder import Decoder
from bloomery.parallel.world import world
from bloomery.progress import Bar
from bloomery.synthesize.gradients import Path as Way
from bloomery.synthesize.gradients import sketch
from bloomery.synthesize.samples import CUT, Sample, batches, encode_samples
from bloomery.synthesize.shards import Block, Columns, Header, check_same, read_block, write_block
from bloomery.synthesize.sketch import SketchConfig, Sketcher
from bloomery.train.model_folder import ModelFolder, open_model, placed

ROWS_PER_BLOCK = 512


class SketchingConfig(Config):
    """Sketch a dataset."""

    data: DatasetDir = Field(description="dataset of kind documents, messages, prompts or traces")
    proxy: ModelDir = Field(description="the small model whose gradients are taken")
    sketch: SketchConfig = Field(default=SketchConfig(), description="the linear map")
    path: Way = Field(default="hooks", description="hooks: fast; loop, vmap: whole gradients. All give the same")
    max_tokens: int = Field(default=2048, gt=1, description="longest sample; prompts lose their beginning (tokens)")
    batch_tokens: int = Field(default=8192, gt=0, description="tokens of one pass, padding included")


def sketch_dataset(config: SketchingConfig, out: Path) -> Header:
    """Writes the missing blocks of this rank to `out`.

    Raises `ArtifactError` where `out` holds sketches of other settings, naming what differs.
    """
    start = open_model(config.proxy)
    header, data = _header(config, start), artifact.digest(config.data, "dataset")
    out.mkdir(parents=True, exist_ok=True)
    total = sum(_rows(file) for file in shards(config.data))
    blocks = -(-total // ROWS_PER_BLOCK)
    for file in out.glob("sketches-*.parquet"):
        _check_old(file, header, data)
    worker = _Worker(config, start)
    with Bar("sketch", blocks) as bar:
        for number, rows in enumerate(_blocks(config.data)):
            block = Block(header=header, data=data, number=number, blocks=blocks, rows=len(rows))
            if number % world().size == world().rank and not (out / block.file).exists():
                worker.make(out, block, rows)
            bar.update(number + 1)
    return header


def _header(config: SketchingConfig, start: ModelFolder) -> Header:
    return Header(
        proxy=artifact.digest(start.path, "model"), vocab_size=start.config.vocab_size, sketch=config.sketch,
        dtype="float32", max_tokens=min(config.max_tokens, start.config.max_position_embeddings),
    )  # fmt: skip


def _check_old(file: Path, header: Header, data: str) -> None:
    block = read_block(file)
    check_same(header, block.header, file)
    if block.data != data:
        raise ArtifactError(f"{file}: of another dataset; choose another folder")


def _rows(file: Path) -> int:
    with open_parquet(file) as parquet:
        return int(parquet.metadata.num_rows)


def _blocks(data: Path) -> Iterator[list[Row]]:
    rows = read_rows(data, kind_of(data))
    while block := list(islice(rows, ROWS_PER_BLOCK)):
        yield block


class _Worker:
    """The proxy, loaded at the first block that is missing."""

    def __init__(self, config: SketchingConfig, start: ModelFolder):
        self.config, self.start, self.sketcher = config, start, Sketcher(config.sketch)

    @cached_property
    def model(self) -> Decoder:
        return placed(hf.load(self.start.path, dtype=torch.float32))

    def make(self, out: Path, block: Block, rows: list[Row]) -> None:
        """Write one block."""
        drops = Drops()
        samples = list(encode_samples(rows, self.start.tokenizer, block.header.max_tokens, drops))
        z, losses = sketch_samples(self.model, samples, self.config, self.start.pad_id, self.sketcher)
        norms = np.linalg.norm(z, axis=1)
        good = np.isfinite(norms) & (norms > 0)
        for place in np.flatnonzero(~good):
            drops.add("gradient zero or not finite", samples[place].id)
        kept = [sample for sample, fine in zip(samples, good, strict=True) if fine]
        ids, sources = [sample.id for sample in kept], [sample.source for sample in kept]
        tokens = np.array([sample.tokens for sample in kept], dtype=np.int32)
        counts = {reason: count for reason, count in drops.counts.items() if reason != CUT}
        first = [name for reason in counts for name in drops.examples[reason]]
        told = block.model_copy(update={"dropped": counts, "dropped_ids": first, "cut": drops.counts[CUT]})
        write_block(out, told, Columns(ids, sources, tokens, losses[good], norms[good], z[good]))


def sketch_samples(
    proxy: Decoder, samples: Sequence[Sample], config: SketchingConfig, pad_id: int, sketcher: Sketcher | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sketches (n, dim) and mean losses (n,) in the order of the samples, in memory."""
    sketcher, device = sketcher or Sketcher(config.sketch), next(proxy.parameters()).device
    z = np.zeros((len(samples), config.sketch.dim), dtype=np.float32)
    losses = np.zeros(len(samples), dtype=np.float32)
    for places, batch in batches(samples, pad_id, config.batch_tokens):
        moved = {name: value.to(device) for name, value in batch.items()}
        found, nll = sketch(proxy, moved, sketcher, config.path)
        z[places], losses[places] = found.float().cpu().numpy(), nll.float().cpu().numpy()
    return z, losses
