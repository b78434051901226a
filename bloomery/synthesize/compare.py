"""G-Vendi beside what else is said to measure diversity, and beside controls, all of one subset of a dataset."""

import numpy as np
import torch

from bloomery.data.document import Drops
from bloomery.model import hf
from bloomery.model.decoder import Decoder
from bloomery.synthesize import baselines, vendi
from bloomery.synthesize.samples import read_samples
from bloomery.synthesize.sketching import SketchingConfig, sketch_samples
from bloomery.train.model_folder import open_model, placed


def compare(config: SketchingConfig, size: int = 1000, seed: int = 0, controls: bool = True) -> dict[str, float]:
    """Measure → value for `size` random samples (all where there are fewer). Compare datasets at one size only.

    controls: G-Vendi by a proxy of the same sizes with random weights, and with each prompt's completion taken from
    another sample; both cost another pass.
    """
    start = open_model(config.proxy)
    longest = min(config.max_tokens, start.config.max_position_embeddings)
    everything = list(read_samples(config.data, start.tokenizer, longest, Drops()))
    draw = np.random.default_rng(seed)
    chosen = [everything[n] for n in np.sort(draw.choice(len(everything), min(size, len(everything)), replace=False))]
    proxy = placed(hf.load(start.path, dtype=torch.float32))
    rows, losses = sketch_samples(proxy, chosen, config, start.pad_id)
    found = {"G-Vendi": _score(rows)} | {
        name.replace("gradient", "G-"): value
        for name, value in baselines.of_rows(rows, "gradient").items()
        if name != "gradient Vendi"
    }
    found["gradient norm"] = float(np.linalg.norm(rows, axis=1).mean())
    found["gradient cluster occupancy"] = baselines.occupancy(rows, seed=seed)
    found["perplexity"] = float(np.exp(min(losses.mean(), 700)))
    found |= baselines.of_rows(baselines.embeddings(proxy, chosen, start.pad_id, config.batch_tokens), "embedding")
    found |= baselines.surface([sample.text for sample in chosen])
    if controls:
        mixed = [sample for sample in baselines.shuffled(chosen, seed) if len(sample.ids) <= longest]
        found["G-Vendi, completions shuffled"] = _score(sketch_samples(proxy, mixed, config, start.pad_id)[0])
        torch.manual_seed(seed)
        untrained = placed(Decoder(start.config).eval())
        found["G-Vendi, untrained proxy"] = _score(sketch_samples(untrained, chosen, config, start.pad_id)[0])
    return found


def _score(rows: np.ndarray) -> float:
    return vendi.score(vendi.spectrum_of(rows))
