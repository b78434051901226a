"""A picture of a dataset in gradient space: one offline HTML page of clusters, density and texts under the pointer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bloomery import artifact
from bloomery.data.dataset import kind_of, read_rows, text_of
from bloomery.synthesize import vendi
from bloomery.synthesize.shards import Sketches

MOST = 3000
_NEIGHBOURS = 10
_SHOWN = 300  # characters of a text


def write_map(
    sketches: Path, data: Path | None, out: Path, clusters: int = 0, most: int = MOST, seed: int = 0
) -> dict[str, Any]:
    """Writes `out` and says what it shows: samples, clusters, the score. Of `most` random samples, t-SNE of their unit
    sketches; `data`: where the texts are."""
    found = Sketches(sketches)
    rows, ids = found.rows(), found.column("id")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])
    unit = vendi.unit(rows[chosen])
    labels = cluster(unit, clusters or max(2, min(40, len(unit) // 25)), seed)
    texts = _texts(data, {ids[place] for place in chosen}) if data is not None else {}
    shown = [texts.get(ids[place], ids[place]) for place in chosen]
    figure = _figure(_layout(unit, seed), labels, density(unit), shown)
    artifact.write_text(out, figure.to_html(include_plotlyjs=True, full_html=True))
    return {
        "map": str(out), "samples": len(unit), "clusters": int(labels.max()) + 1,
        "g_vendi": vendi.score(vendi.spectrum_of(unit)),
    }  # fmt: skip


def cluster(unit: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(n,) spherical k-means, k-means++ start, the largest cluster 0."""
    from sklearn.cluster import KMeans

    labels = KMeans(min(count, len(unit)), n_init=1, random_state=seed).fit_predict(unit)
    order = np.argsort(-np.bincount(labels), kind="stable")
    return np.argsort(order)[labels]


def density(unit: np.ndarray) -> np.ndarray:
    """(n,) mean cosine with the ten nearest others; 1 means copies."""
    count = min(_NEIGHBOURS, len(unit) - 1)
    found = np.ones(len(unit))
    for start in range(0, len(unit), 1024):
        cosines = unit[start : start + 1024] @ unit.T
        cosines[np.arange(len(cosines)), start + np.arange(len(cosines))] = -np.inf
        found[start : start + 1024] = np.sort(cosines, axis=1)[:, -count:].mean(1)
    return found


def _layout(unit: np.ndarray, seed: int) -> np.ndarray:
    """(n, 2) t-SNE of the first principal components."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    reduced = PCA(min(50, *unit.shape), random_state=seed).fit_transform(unit)
    return TSNE(perplexity=min(30, (len(unit) - 1) / 3), init="pca", random_state=seed).fit_transform(reduced)


def _texts(data: Path, wanted: set[str]) -> Mapping[str, str]:
    return {row["id"]: text_of(row)[:_SHOWN] for row in read_rows(data, kind_of(data)) if row["id"] in wanted}


def _figure(places: np.ndarray, labels: np.ndarray, dense: np.ndarray, texts: Sequence[str]) -> Any:
    import html

    import plotly.graph_objects as go

    hover = [
        f"cluster {label} · density {value:.2f}<br>" + "<br>".join(_lines(html.escape(text)))
        for label, value, text in zip(labels, dense, texts, strict=True)
    ]
    colours = {"cluster": (labels, "Turbo"), "density": (dense, "Viridis")}
    figure = go.Figure([
        go.Scattergl(
            x=places[:, 0], y=places[:, 1], mode="markers", text=hover, hoverinfo="text", name=name,
            visible=name == "cluster",
            marker={"color": values, "colorscale": scale, "size": 6, "colorbar": {"title": name}},
        )
        for name, (values, scale) in colours.items()
    ])  # fmt: skip
    buttons = [
        {"label": f"colour by {name}", "method": "update", "args": [{"visible": [name == other for other in colours]}]}
        for name in colours
    ]
    axis = {"visible": False}
    return figure.update_layout(
        title=f"{len(labels)} samples by their gradients", template="plotly_white",
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.06}], xaxis=axis,
        yaxis=axis | {"scaleanchor": "x"}, showlegend=False,
    )  # fmt: skip


def _lines(text: str, width: int = 80) -> list[str]:
    return [line[start : start + width] for line in text.splitlines() for start in range(0, max(1, len(line)), width)]
