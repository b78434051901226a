"""Other measures of diversity, for the same table: what they count is the surface, or what a model represents.

Every number is made from the same subset of samples as the rarefied G-Vendi beside it, because all grow with size.
"""

import gzip
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from bloomery.model.decoder import Decoder
from bloomery.synthesize import vendi
from bloomery.synthesize.samples import Sample, batches

_TEMPERATURE = 0.05  # of DCScore's softmax
_RIDGE = 0.1  # of the log-determinant


def surface(texts: Sequence[str]) -> dict[str, float]:
    """Entropy in nats of word n-grams, share of distinct ones, and size after gzip over size before."""
    found: dict[str, float] = {}
    for n in (1, 2, 3):
        counts = Counter(gram for text in texts for gram in _grams(text.split(), n))
        total = counts.total()
        found[f"{n}-gram entropy"] = -sum(c / total * math.log(c / total) for c in counts.values())
        found[f"distinct {n}-grams"] = len(counts) / total if total else 0.0
    raw = "\n".join(texts).encode()
    return found | {"gzip ratio": len(gzip.compress(raw, mtime=0)) / len(raw)}


def _grams(words: list[str], n: int) -> "zip[tuple[str, ...]]":
    return zip(*(itertools.islice(words, start, None) for start in range(n)), strict=False)


@torch.no_grad()
def embeddings(model: Decoder, samples: Sequence[Sample], pad_id: int, batch_tokens: int = 8192) -> np.ndarray:
    """(n, hidden) float32: the mean of the last hidden states over a sample's tokens, prompt included."""
    device = next(model.parameters()).device
    found = np.zeros((len(samples), model.config.hidden_size), dtype=np.float32)
    for places, batch in batches(samples, pad_id, batch_tokens):
        hidden = model(batch["input_ids"].to(device)).float()
        lengths = torch.tensor([len(samples[place].ids) - 1 for place in places], device=device)
        inside = torch.arange(hidden.shape[1], device=device) < lengths[:, None]
        found[places] = ((hidden * inside.unsqueeze(2)).sum(1) / lengths[:, None]).cpu().numpy()
    return found


def of_rows(rows: np.ndarray, name: str) -> dict[str, float]:
    """Of vectors (n, dim), embeddings or sketches: Vendi of order 1 and 2, raw and centred, DCScore (arXiv 2502.08512),
    log-determinant, mean distance."""
    moments, unit = vendi.Moments.of(rows), vendi.unit(rows)
    values, centred = vendi.spectrum(moments.density), vendi.spectrum(moments.centred)
    count = len(rows)
    return {
        f"{name} Vendi": vendi.score(values),
        f"{name} Vendi, centred": vendi.score(centred) if len(centred) else 1.0,
        f"{name} Vendi, order 2": vendi.order_two(values),
        f"{name} DCScore": dcscore(unit),
        f"{name} log-determinant": float(np.log1p(values / _RIDGE).sum() / 2),
        f"{name} mean distance": 1 - (float(np.square(unit.sum(0)).sum()) - count) / (count * (count - 1)),
    }


def dcscore(unit: np.ndarray, temperature: float = _TEMPERATURE) -> float:
    """Sum over samples of the probability that each is classified as itself, from 1 to their number."""
    total = 0.0
    for start in range(0, len(unit), 1024):
        logits = unit[start : start + 1024] @ unit.T / temperature
        own = logits[np.arange(len(logits)), start + np.arange(len(logits))]
        most = logits.max(1)
        total += float(np.exp(own - most - np.log(np.exp(logits - most[:, None]).sum(1))).sum())
    return total


def occupancy(rows: np.ndarray, clusters: int | None = None, seed: int = 0) -> float:
    """Entropy in nats of the sizes of k-means clusters of unit rows; default: a tenth as many clusters as rows."""
    from sklearn.cluster import MiniBatchKMeans

    count = clusters or max(2, len(rows) // 10)
    labels = MiniBatchKMeans(count, n_init=1, random_state=seed).fit_predict(vendi.unit(rows))
    sizes = np.bincount(labels, minlength=count)
    shares = sizes[sizes > 0] / len(rows)
    return float(-(shares * np.log(shares)).sum())


def shuffled(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Each prompt with the completion of another sample: a control that keeps all surface and no lesson."""
    order = np.random.default_rng(seed).permutation(len(samples))
    return [_joined(one, samples[other]) for one, other in zip(samples, order, strict=True)]


def _joined(prompt: Sample, other: Sample) -> Sample:
    first, start = int(prompt.learnt.argmax()), int(other.learnt.argmax())
    ids = np.concatenate([prompt.ids[:first], other.ids[start:]])
    learnt = np.concatenate([prompt.learnt[:first], other.learnt[start:]])
    return Sample(prompt.id, prompt.source, prompt.text, ids, learnt)
