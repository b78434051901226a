"""One self-contained HTML page about a run: opens offline, asks the network for nothing."""

import json
from collections.abc import Iterable
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bloomery import artifact
from bloomery.report import curves, efficiency, facts, kept, lineage, quantities, results, samples
from bloomery.report.run import Run, Stage, read_run

PAGE = "report.html"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about the run folder `run` to `out` (by default `report.html` inside it) and return its path.

    Stages that are unfinished or damaged are shown as such. Raises `ArtifactError` when the folder holds no stage.
    """
    page = render(read_run(run))
    target = Path(out) if out else Path(run) / PAGE
    artifact.write_text(target, page)
    return target


def render(run: Run) -> str:
    """The page as text. The same run always gives the same page."""
    import plotly.offline

    found = results.evaluations(run)
    pictures = {stage.name: curves.pictures(stage) for stage in run.stages}
    compared = efficiency.comparisons(found)
    return _template().render(
        run=run,
        overview=_overview(run),
        headlines=results.headlines(found),
        tables=results.tables(found),
        life=lineage.lineage(run),
        row_height=lineage.ROW,
        longest=max((stage.seconds or 0 for stage in run.stages), default=0) or 1,
        headlines_of=facts.headlines,
        pictures={name: made for name, made in pictures.items() if made},
        compared=compared,
        curve_data=_curve_data([*chain(*pictures.values()), *(each.picture for each in compared)]),
        problems=samples.problems(found),
        data={stage.name: tables for stage in run.stages if (tables := _data_tables(run, stage))},
        kept={stage.name: found for stage in run.stages if (found := kept.kept(stage))},
        models=[size for stage in run.stages if (size := facts.model_size(stage))],
        summary_rows=facts.summary_rows,
        summary_tables=facts.summary_tables,
        progress=_progress,
        plotly=Markup(plotly.offline.get_plotlyjs()),
        style=Markup(_resource("style.css")),
        script=Markup(_resource("page.js")),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for name in ("percent", "count", "grouped", "size", "duration", "moment", "words", "number"):
        environment.filters[name] = getattr(quantities, name)
    return environment.from_string(_resource("page.html.jinja"))


def _resource(name: str) -> str:
    return (resources.files("bloomery.report") / name).read_text(encoding="utf-8")


def _overview(run: Run) -> dict[str, Any]:
    """Plain facts for the head of the page."""
    done = run.finished
    sizes = [size for stage in reversed(done) if (size := facts.model_size(stage))]
    return {
        "finished": len(done),
        "stages": len(run.stages),
        "seconds": sum(stage.seconds or 0 for stage in run.stages),
        "ended": max((stage.manifest.finished for stage in done if stage.manifest), default=None),
        "versions": ", ".join(dict.fromkeys(stage.manifest.version for stage in done if stage.manifest)),
        "seeds": ", ".join(
            dict.fromkeys(str(s.manifest.seed) for s in done if s.manifest and s.manifest.seed is not None)
        ),
        "model": sizes[0] if sizes else None,
    }


def _data_tables(run: Run, stage: Stage) -> list[tuple[str, facts.Grid]]:
    tables, account = facts.data_tables(stage), kept.kept(stage)
    if account is not None and stage.summary.get("inventory"):  # the bars and the inventory say what this would repeat
        tables = [(title, grid) for title, grid in tables if title != "sources"]
    reasons = [("dropped", account.reasons)] if account is not None and account.reasons is not None else []
    return tables + reasons + facts.planned_and_read(stage, map(run.stage, stage.sources))


def _progress(stage: Stage) -> str:
    """How far an unfinished stage came."""
    if not stage.metrics:
        return "nothing logged yet"
    step, loop = stage.metrics[-1].get("step", len(stage.metrics)), stage.config.get("loop", {})
    planned = next(
        (place[name] for place in (loop, stage.config) for name in ("max_steps", "steps") if name in place), None
    )
    return f"reached step {quantities.grouped(step)}" + (f" of {quantities.grouped(planned)}" if planned else "")


def _curve_data(pictures: Iterable[curves.Picture]) -> Markup:
    """JSON that no text inside it can end: `<`, `>` and `&` are written as escapes."""
    data = {each.id: {"traces": each.traces, "unit": each.unit} for each in pictures}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate({ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&"}))
