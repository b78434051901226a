"""`bloomery diversity`: how many directions a dataset teaches, by the gradients of a small model."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="How diverse data is by the gradients of a small model (G-Vendi).")

AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
Proxy = Annotated[Path | None, typer.Option(help="small model whose gradients are taken: a stage's or HF folder")]
Out = Annotated[Path | None, typer.Option(help="folder of the sketches; default: one for data and settings in runs/")]
Dim = Annotated[int, typer.Option(help="numbers in a sketch; the same for all data that is compared", min=2)]
Kind = Annotated[str, typer.Option(help="countsketch, or rademacher as in the paper (slow)")]
Seed = Annotated[int, typer.Option(help="seed of the map; the same for all data that is compared")]
MaxTokens = Annotated[int, typer.Option(help="longest sample; prompts lose their beginning", min=2)]


@app.command("sketch")
def sketch_data(
    dataset: Path,
    proxy: Annotated[Path, typer.Option(help="small model whose gradients are taken: a stage's or HF folder")],
    out: Out = None,
    dim: Dim = 1024,
    kind: Kind = "countsketch",
    seed: Seed = 0,
    max_tokens: MaxTokens = 2048,
    as_json: AsJson = False,
) -> None:
    """Sketch the gradient of every sample; goes on where it stopped; under torchrun each rank makes its share."""
    folder = _sketched(dataset, proxy, out, dim, kind, seed, max_tokens)
    typer.echo(json.dumps({"sketches": str(folder)}) if as_json else str(folder))


def _settings(dataset: Path, proxy: Path, dim: int, kind: str, seed: int, max_tokens: int) -> Any:
    from bloomery import config
    from bloomery.synthesize.sketching import SketchingConfig

    return config.build(SketchingConfig, {
        "data": dataset, "proxy": proxy, "sketch": {"kind": kind, "dim": dim, "seed": seed}, "max_tokens": max_tokens,
    })  # fmt: skip


def _sketched(dataset: Path, proxy: Path, out: Path | None, dim: int, kind: str, seed: int, max_tokens: int) -> Path:
    from bloomery import artifact, config
    from bloomery.synthesize.sketching import sketch_dataset

    chosen = _settings(dataset, proxy, dim, kind, seed, max_tokens)
    if out is None:
        inputs = config.inputs(chosen).items()
        digests = {name: artifact.digest(artifact.resolve(path, what), what) for name, (what, path) in inputs}
        out = Path("runs/sketches") / f"{dataset.name}-{artifact.key('sketch', chosen, digests)[:12]}"
    sketch_dataset(chosen, out)
    return out


@app.command("score")
def score_data(
    data: Annotated[list[Path], typer.Argument(help="a dataset (with --proxy), or folders of sketches, scored as one")],
    proxy: Proxy = None,
    out: Out = None,
    dim: Dim = 1024,
    kind: Kind = "countsketch",
    seed: Seed = 0,
    max_tokens: MaxTokens = 2048,
    size: Annotated[
        list[int] | None, typer.Option(help="rarefy to this many samples; may be repeated; default: 500, 1000, 2000")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="also other measures and controls, of one subset of the first size")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """G-Vendi of a dataset with its interval, rarefied to common sizes. Compare rarefied scores only."""
    from bloomery.errors import ConfigError
    from bloomery.synthesize.score import SIZES, score

    if proxy is not None and len(data) > 1:
        raise ConfigError(
            f"--proxy: with {len(data)} datasets; sketch each with `diversity sketch`, then score folders"
        )
    folders = data if proxy is None else [_sketched(data[0], proxy, out, dim, kind, seed, max_tokens)]
    found = score(*folders, sizes=size or SIZES)
    if baselines:
        if proxy is None:
            raise ConfigError("--baselines: needs the dataset and --proxy; sketches alone hold neither text nor model")
        from bloomery.synthesize.compare import compare

        found["baselines"] = compare(_settings(data[0], proxy, dim, kind, seed, max_tokens), (size or SIZES)[0])
    typer.echo(json.dumps(found) if as_json else _text(found))


def _text(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    lines = [
        f"G-Vendi            {found['g_vendi']:.2f}  [{low:.2f}, {high:.2f}]  of {found['samples']:,} samples",
        *(f"  rarefied to {size:<6} {value:.2f}" for size, value in found["rarefied"].items()),
        f"  of the ceiling   {found['of_ceiling']:.1%}  ({found['ceiling']:.1f} for isotropic gradients)",
        f"  centred          {found['centred']:.2f}",
        f"  order 2          {found['order_2']:.2f}",
        f"  λ₁               {found['lambda_1']:.3f}",
        f"  halves of sketch {found['halves'][0]:.2f}, {found['halves'][1]:.2f}",
        *(
            f"  {part['tokens'][0]} to {part['tokens'][1]} tokens: {part['score']:.2f} of {part['size']} samples"
            for part in found["lengths"]
        ),
        f"perplexity         {found['perplexity']:.2f}",
        f"gradient norm      {found['gradient_norm']:.3g}",
    ]
    if found["sources"]:
        shares = ", ".join(f"{name} {value:.2f}" for name, value in found["sources"]["of_source"].items())
        lines.append(f"sources in nats    {shares}; between them {found['sources']['between']:.2f}")
    lines += [f"dropped            {count} {reason}" for reason, count in found["dropped"].items()]
    lines += [f"{name:<32} {value:.4g}" for name, value in found.get("baselines", {}).items()]
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])


@app.command("select")
def select_data(
    sketches: Annotated[Path, typer.Argument(help="folder of sketches")],
    count: Annotated[int | None, typer.Option(help="samples to keep; default: a weight for each", min=1)] = None,
    method: Annotated[str, typer.Option(help="greedy (log-determinant) or gain (for large pools)")] = "greedy",
    out: Annotated[Path | None, typer.Option(help="JSONL to write; default: standard output")] = None,
) -> None:
    """Which samples to keep, or how much to weigh each, so that the score is high: one JSON line a sample."""
    from bloomery import artifact
    from bloomery.errors import ConfigError
    from bloomery.synthesize import select
    from bloomery.synthesize.shards import Sketches

    methods = {"greedy": select.greedy, "gain": select.by_gain}
    if method not in methods:
        raise ConfigError(f"--method: {method!r}; choose {' or '.join(methods)}")
    found = Sketches(sketches)
    ids, rows = found.column("id"), found.rows()
    if count is not None and count > len(rows):
        raise ConfigError(f"--count: {count} of {len(rows)} samples; choose at most all")
    if count is None:
        lines = [{"id": name, "weight": round(float(w), 4)} for name, w in zip(ids, select.weights(rows), strict=True)]
    else:
        lines = [{"id": ids[place]} for place in methods[method](rows, count).tolist()]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if out is None:
        typer.echo(text, nl=False)
    else:
        artifact.write_text(out, text)


@app.command("map")
def map_data(
    sketches: Annotated[Path, typer.Argument(help="folder of sketches")],
    out: Annotated[Path, typer.Option(help="HTML page to write")],
    data: Annotated[Path | None, typer.Option(help="the dataset, for the texts under the pointer")] = None,
    clusters: Annotated[int, typer.Option(help="k-means clusters; 0: by the number of samples", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw a dataset in gradient space: clusters, density, texts. One offline page."""
    from bloomery.synthesize.map import write_map

    found = write_map(sketches, data, out, clusters)
    typer.echo(json.dumps(found) if as_json else found["map"])
