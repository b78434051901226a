"""The `bloomery` command: verbs. The only place that prints an error and exits."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from bloomery import config as configs
from bloomery import diversity, recipe
from bloomery.errors import BloomeryError, PeerError
from bloomery.parallel.world import reports, world

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Take a language model through its whole life, from raw text to an evaluated, exported reasoner.",
)  # fmt: skip

INTERRUPTED = 130
UsageError = typer.BadParameter.__mro__[1]  # typer does not re-export it
Overrides = Annotated[list[str] | None, typer.Argument(help="settings to change, as key=value", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="run folder; default: the recipe's own")]


def main() -> None:
    """Entry point: one clear paragraph for a user's error, a traceback only for our own bugs."""
    # On a busy laptop, threads that spin long at a barrier slow small matrix products many times over; a short spin
    # costs an idle one nothing. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        code = app(standalone_mode=False)
    except BloomeryError as error:
        _fail(str(error), error.exit_code, consequence=isinstance(error, PeerError))
    except UsageError as error:  # unknown verb, missing argument
        if world().is_main:
            error.show()
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _fail("interrupted; run the same command to continue where it stopped", INTERRUPTED)
    sys.exit(code or 0)


def _fail(message: str, code: int, consequence: bool = False) -> None:
    """Print once for all ranks of a run, and exit."""
    if reports(message, consequence):
        where = f"rank {world().rank}: " if world().size > 1 else ""
        typer.echo(f"bloomery: {where}{message}", err=True)
    sys.exit(code)


@app.command("run")
def run_recipe(recipe_file: Path, overrides: Overrides = None, out: RunFolder = None, as_json: AsJson = False) -> None:
    """Run a recipe: every stage that is not done yet, then the report."""
    folder, steps = recipe.load(recipe_file, overrides or [], out)
    manifests = recipe.run(folder, steps)
    if not world().is_main:
        return
    page = _write_report(folder)
    if as_json:
        stages = {step.name: manifest.model_dump(mode="json") for step, manifest in zip(steps, manifests, strict=True)}
        typer.echo(json.dumps({"run": str(folder), "report": str(page), "stages": stages}))
    else:
        typer.echo(f"\n{_results(folder)}report: {page}")


def _write_report(folder: Path) -> Path:
    from bloomery.report.report import write_report

    return write_report(folder)


def _results(folder: Path) -> str:
    from bloomery.report.results import results_table

    return results_table(folder)


@app.command()
def check(recipe_file: Path, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Resolve a recipe and say what it will do: order, sizes, memory, tokens, first batch. Needs no GPU."""
    folder, steps = recipe.load(recipe_file, overrides or [])
    findings = recipe.check(steps)
    if as_json:
        typer.echo(json.dumps({"run": str(folder), "stages": findings}, default=str))
        return
    for name, finding in findings.items():
        typer.echo(f"{name}  ({finding.pop('stage')})")
        typer.echo("".join(f"  {_line(key, value)}\n" for key, value in finding.items()), nl=False)
    typer.echo(f"\n{recipe_file}: {len(steps)} stages, all settings are valid; output goes to {folder}")


def _line(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{name.removesuffix('_bytes')}: {value / 2**20:,.1f} MiB"
    return f"{name}: {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"\n    {key}: {_shown(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("\n", "\n    ")


@app.command()
def report(run: Path, as_json: AsJson = False) -> None:
    """Write one offline HTML page over a run's folder."""
    page = _write_report(run)
    typer.echo(json.dumps({"report": str(page)}) if as_json else str(page))


@app.command()
def chat(
    model: Path,
    message: Annotated[
        str | None, typer.Argument(help="one question; without it, a conversation on the terminal")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, tokens")] = 256,
    temperature: Annotated[float, typer.Option(help="sampling temperature; 0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    as_json: AsJson = False,
) -> None:
    """Talk to a model: a stage's folder or any Hugging Face directory of a supported family."""
    from bloomery.chat import Conversation

    conversation = Conversation(model, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if message is not None or not sys.stdin.isatty():
        answer = conversation.ask(message if message is not None else sys.stdin.read().strip())
        typer.echo(json.dumps({"answer": answer}) if as_json else answer)
        return
    typer.echo("type a message; an empty line ends the conversation", err=True)
    while question := typer.prompt("you", default="", show_default=False):
        typer.echo(conversation.ask(question))


@app.command()
def serve(
    model: Path,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 takes a free one")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="BLOOMERY_API_KEY", help="what clients must send as their key", show_default=False),
    ] = None,
    unprotected: Annotated[bool, typer.Option("--unprotected", help="serve other machines without a key")] = False,
    name: Annotated[str | None, typer.Option(help="the model's name for clients; default: the folder's")] = None,
    max_batch: Annotated[int, typer.Option(help="sequences generated at once", min=1)] = 16,
    max_tokens: Annotated[
        int | None, typer.Option(help="longest prompt and completion together; default: the model's context", min=1)
    ] = None,
    queue: Annotated[int, typer.Option(help="requests that may wait; past it, 429", min=0)] = 256,
    timeout_seconds: Annotated[float, typer.Option(help="longest time for one answer")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(help="time for running answers after SIGTERM")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Serve a model over HTTP with OpenAI's API, until SIGTERM or Ctrl-C."""
    from bloomery.generate import serve as http
    from bloomery.serve import open_service

    limits = configs.build(
        http.ServeLimits, {"queue": queue, "timeout_seconds": timeout_seconds, "drain_seconds": drain_seconds}
    )
    with http.listen(host, port, protected=bool(api_key) or unprotected) as listening:
        service = open_service(
            model, limits=limits, max_batch=max_batch, max_tokens=max_tokens, name=name, api_key=api_key
        )
        served = {"model": service.model.name, "url": http.address(listening)}
        typer.echo(json.dumps(served) if as_json else f"serving {served['model']} at {served['url']}")
        http.serve(service, listening)


@app.command("plan")
def plan_mapping(
    recipe_or_model: Annotated[Path, typer.Argument(help="a recipe, a model's settings as YAML, or a model folder")],
    cluster: Annotated[str, typer.Option(help="GPUs and their kind, for example 128xH100")],
    sequence: Annotated[
        int | None,
        typer.Option(help="tokens of a sequence; default: the recipe's, or 4,096", min=1, show_default=False),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="sequences of a step; default: the recipe's, or 1,024", min=1, show_default=False)
    ] = None,
    imbalance: Annotated[float, typer.Option(help="tokens of the fullest expert rank over the mean")] = 1.0,
    simulate: Annotated[
        Path | None, typer.Option(help="draw how it scales to thousands of GPUs, to this SVG", show_default=False)
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="put the mapping into the recipe's stage pretrain")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose how to lay a model out over a cluster: memory, exposed communication, bubble and MFU, predicted."""
    from bloomery import plan

    choice = plan.plan(recipe_or_model, cluster, sequence, batch, imbalance)
    if simulate:
        plan.simulate(recipe_or_model, choice, simulate)
    written = plan.write(recipe_or_model, choice) if write else []
    if as_json:
        found = {"picture": str(simulate)} if simulate else {}
        typer.echo(json.dumps(plan.as_json(choice) | found | ({"written": written} if write else {})))
        return
    typer.echo(plan.text(choice) + (f"picture: {simulate}" if simulate else ""))
    if write:
        typer.echo(f"written into {recipe_or_model}: {', '.join(written)}")


@app.command("claim")
def run_claim(
    name: Annotated[str | None, typer.Argument(help="a claim, as --list shows them", show_default=False)] = None,
    smoke: Annotated[bool, typer.Option(help="a minute at tiny sizes: checks the machinery, judges nothing")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="all claims with their last verdicts")] = False,
    out: Annotated[Path | None, typer.Option(help="where cells are kept; default: runs/claims/NAME")] = None,
    as_json: AsJson = False,
) -> None:
    """Test a paper's claim over arms and seeds, and write its page to docs/claims. Needs a checkout."""
    from bloomery import claim

    root = Path.cwd()
    if show_list or name is None:
        listed = claim.listing(root)
        typer.echo(json.dumps(listed) if as_json else "\n".join(map(_claim_lines, listed)))
        return
    findings = claim.run(claim.load(name, root), root, out, smoke)
    typer.echo(json.dumps(findings) if as_json else "\n".join(map(_finding_line, findings)))


def _claim_lines(listed: dict[str, Any]) -> str:
    findings = [f"\n  {_finding_line(finding)}" for finding in listed["findings"]] or ["\n  not run yet"]
    return f"{listed['name']}: {listed['title']}{''.join(findings)}"


def _finding_line(finding: dict[str, Any]) -> str:
    low, high = finding["ci"]
    effect = f"{finding['effect']:.4g} [{low:.4g}, {high:.4g}]"
    return f"{finding['verdict']:<12} {finding['claim']}: {effect}, expected {finding['direction']}"


@app.command()
def convert(
    model: Path,
    out: Path,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: that of the source")] = None,
    family: Annotated[str | None, typer.Option(help="model type to write; default: that of the source")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model of any supported family anew, and compare original, export and transformers layer by layer."""
    from bloomery.evaluate.convert import convert as convert_model

    found = convert_model(model, out, dtype, family)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(
        f"{found['out']}: {found['family']}, {found['dtype']}, carried over: {', '.join(found['carried']) or '-'}"
    )
    typer.echo(f"on {found['tokens']} random tokens, float32:")
    for name, difference in found["parity"].items():
        first = difference["first_layer"]
        where = "no layer differs" if first is None else f"layers differ from {first} on"
        typer.echo(
            f"  {_COMPARED[name]:<34} logits max {difference['max']:.2e}, mean {difference['mean']:.2e}, "
            f"KL {difference['kl']:.2e}; {where}"
        )


_COMPARED = {
    "original": "original: ours and transformers",
    "export": "export: ours and transformers",
    "original_to_export": "ours: original and export",
}


@app.command()
def inspect(model: Path, as_json: AsJson = False) -> None:
    """Sizes, parameters, bytes and operations of a model; reads its config.json alone."""
    from bloomery import artifact
    from bloomery.model import hf
    from bloomery.model.summary import summarize

    found = summarize(hf.load_config(artifact.resolve(model, "model")))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        if name.endswith("_bytes"):
            value = {_shown(key): _scaled(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB")) for key, n in value.items()}
        elif name.endswith("flops_per_token"):
            value = {_shown(key): _scaled(n, 1000, ("", "K", "M", "G", "T", "P")) for key, n in value.items()}
        typer.echo(_line(name.removesuffix("_bytes"), value))


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    """The number in the largest unit in which it is at least 1."""
    power = min(len(units) - 1, int(math.log(max(number, 1), step)))
    return f"{number / step**power:,.4g} {units[power]}".rstrip()


verify = typer.Typer(no_args_is_help=True, help="Verdicts: is a completion right?")
app.add_typer(verify, name="verify")


@verify.command("audit")
def verify_audit(
    dataset: Annotated[Path, typer.Argument(help="dataset folder of prompts")],
    rollouts: Annotated[
        Path | None, typer.Option(help="stored rollouts to judge again: a folder of Parquet or JSONL, or a file")
    ] = None,
    benchmark: Annotated[
        list[Path] | None, typer.Option(help="dataset folder of prompts that must not be in this one; may be repeated")
    ] = None,
    max_error: Annotated[
        float, typer.Option(help="largest share of prompts or rollouts that are misjudged, or in a benchmark", min=0)
    ] = 0.01,
    limit: Annotated[int | None, typer.Option(help="only the first prompts", min=1)] = None,
    worst: Annotated[int, typer.Option(help="how many wrong verdicts are listed", min=0)] = 20,
    workers: Annotated[int, typer.Option(help="worker processes", min=1)] = 2,
    as_json: AsJson = False,
) -> None:
    """Judge completions of known verdict for every prompt; fails when too many come out otherwise."""
    from bloomery.posttrain.audit import audit

    found = audit(dataset, rollouts, limit, workers, worst, benchmark or ())
    typer.echo(json.dumps(found) if as_json else "\n".join(_audit_lines(found)))
    if found["error"] > max_error:
        typer.echo(f"bloomery: estimated error {found['error']:.2%} is above {max_error:.2%}", err=True)
        raise typer.Exit(1)


def _audit_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for part in [name for name in ("prompts", "rollouts") if name in found]:
        measured = found[part]
        for source, rates in measured["sources"].items():
            lines.append(
                f"{part}  {source}: {rates['prompts']} prompts, {rates['cases']} verdicts; prompts with a right answer "
                f"refused {rates['false_negative']:.2%}, with a wrong one paid {rates['false_positive']:.2%}; "
                f"verdicts that differ {rates['differing']:.2%}, not judged {rates['unjudged']}"
            )
            lines += [
                f"  {kind}: {', '.join(f'{count} {status}' for status, count in counts.items())}"
                for kind, counts in rates["statuses"].items()
            ]
        lines += [f"  {_line(name, f'{seconds:.3g} s')}" for name, seconds in measured["seconds"].items()]
        lines += [
            f"  {wrong['source']} {wrong['id']}, {wrong['kind']}: {wrong['status']}, expected {wrong['expected']}: "
            f"{wrong['completion']!r} for {wrong['answer']!r}"
            for wrong in measured["worst"]
        ]
    if overlap := found.get("overlap"):
        lines.append(
            f"overlap: {overlap['prompts']} prompts ({overlap['share']:.2%}) hold nine words of a benchmark's prompt; "
            f"{overlap['renumbered']} more with other numbers"
        )
        lines += [
            f"  {hit['document']} and {hit['benchmark']} {hit['item']}: {hit['words']}" for hit in overlap["first"]
        ]
    return [*lines, f"estimated error: {found['error']:.2%}"]


sandbox = typer.Typer(no_args_is_help=True, help="The place where untrusted programs run, and nowhere else.")
app.add_typer(sandbox, name="sandbox")


@sandbox.command("check")
def sandbox_check(as_json: AsJson = False) -> None:
    """Attack the sandbox on this machine; fails when anything gets through."""
    from bloomery.verify.sandbox import attacks

    held = [finding.name for finding in attacks.check()]
    typer.echo(json.dumps({"held": held}) if as_json else f"all {len(held)} attacks were held: {', '.join(held)}")


@sandbox.command("run")
def sandbox_run(
    program: Path,
    tests: Annotated[
        Path | None, typer.Option(help="JSON file of the tests; default: run once, on standard input")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a Python program in the sandbox: once, or against tests."""
    from bloomery.verify import sandbox_run

    outcome = sandbox_run.run_file(program, tests, sys.stdin.buffer)
    typer.echo(json.dumps(outcome) if as_json else "\n".join(f"{name}: {value}" for name, value in outcome.items()))
    if outcome["status"] not in ("correct", "done"):
        raise typer.Exit(1)


class StageCommand(TyperCommand):
    """A stage's verb; its help ends with the reference of every setting, read from the config class only then."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        formatter.write(
            "\nSettings:\n" + "".join(f"  {line}\n" for line in _reference(recipe.stage_config(self.name or "")))
        )


def _reference(cls: type[configs.Config], prefix: str = "") -> list[str]:
    lines = []
    for name, field in cls.model_fields.items():
        nested = list(configs.models_in(field.annotation))
        shown = "" if nested else f" [{'required' if field.is_required() else _default(field)}]"
        lines.append(f"{prefix}{name}: {field.description or ''}{shown}")
        for model in nested:
            lines += _reference(model, f"{prefix}{name}.")
    return lines


def _default(field: FieldInfo) -> str:
    return "follows other settings" if field.default_factory_takes_validated_data else repr(field.get_default())


def _stage_verb(stage: str) -> Any:
    def verb(
        config_file: Annotated[str, typer.Argument(help="the stage's YAML settings, or - for standard input")],
        overrides: Overrides = None,
        out: Annotated[
            Path | None, typer.Option("--out", help="output folder; default: the folder of config.yaml")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        cls, path = recipe.stage_config(stage), Path(config_file)
        data = configs.parse_yaml(sys.stdin.read()) if config_file == "-" else configs.read_yaml(path)
        config = configs.build(cls, configs.apply_overrides(data or {}, overrides or []))
        if out is None and path.name != "config.yaml":
            raise configs.ConfigError("--out: missing; give the folder that the stage shall write")
        step = recipe.Step(stage, stage, config, out or path.parent, ())
        manifests = recipe.run(step.out, [step])
        if not world().is_main:
            return
        [manifest] = manifests
        typer.echo(json.dumps(manifest.model_dump(mode="json")) if as_json else str(step.out))

    verb.__doc__ = f"Run the {stage} stage alone."
    return verb


class StageGroup(TyperGroup):
    """A stage that has verbs of its own: what is none of them goes to the stage, as in `bloomery blend config.yaml`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args and self.get_command(ctx, args[0]) is not None
        return super().resolve_command(ctx, args if known else [self.name or "", *args])


blend = typer.Typer(cls=StageGroup, no_args_is_help=True, help="Blends: the stage, and what it will read.")
app.add_typer(blend, name="blend")


@blend.command("explain")
def blend_explain(
    recipe_or_plan: Annotated[Path, typer.Argument(help="a recipe, a blend's settings, its folder or its plan.json")],
    overrides: Overrides = None,
    picture: Annotated[Path | None, typer.Option(help="draw the phases to this SVG", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Tokens and epochs of every source in every phase, exact; fails where a source is read above its max_epochs."""
    from bloomery import blends

    found = blends.explain(recipe_or_plan, overrides or [])
    if picture:
        blends.draw(found, picture)
    if as_json:
        typer.echo(json.dumps({name: explanation.as_json() for name, explanation in found.items()}))
    else:
        typer.echo("\n\n".join(f"{name}\n{explanation.text()}" for name, explanation in found.items()))
    over = [text for explanation in found.values() for text in explanation.over.values()]
    if over:
        raise configs.ConfigError("\n".join(over))


@blend.command("search")
def blend_search(
    table: Annotated[Path, typer.Argument(help="runs of small models: CSV, JSONL or Parquet, a row for each")],
    plan: Annotated[Path, typer.Option(help="the blend to better: a recipe, a blend's settings or its folder")],
    overrides: Overrides = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="column to optimize, as loss/NAME or loss/NAME=WEIGHT; may be repeated; default: all losses"),
    ] = None,
    draws: Annotated[int, typer.Option(help="refits on reweighted runs, from which intervals come", min=8)] = 48,
    seed: Annotated[int, typer.Option(help="seed of folds, refits and candidates")] = 0,
    as_json: AsJson = False,
) -> None:
    """Propose a blend within the plan's caps, with the interval its run should fall in; refuses what it cannot know."""
    from bloomery import blends

    found = blends.search(table, plan, overrides or [], dict(map(_weighted, target or [])), draws, seed)
    typer.echo(json.dumps(found.as_json()) if as_json else found.text())


def _weighted(target: str) -> tuple[str, float]:
    name, equals, weight = target.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError:
        raise configs.ConfigError(f"--target {target}: found weight {weight!r}, expected a number") from None


app.add_typer(diversity.app, name="diversity")
_GROUPS = {"blend": blend}
for _stage in recipe.STAGES:
    _GROUPS.get(_stage, app).command(_stage, cls=StageCommand)(_stage_verb(_stage))
