"""`bloomery blend`: finds the blends that a recipe, a stage's settings or a finished folder plan, and better ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bloomery import config as configs
from bloomery import recipe
from bloomery.claim.picture import COLORS, save
from bloomery.data.blend_config import BlendConfig
from bloomery.data.blend_proposal import Proposed, propose
from bloomery.data.explain import Explanation, explain_config, explain_folder
from bloomery.errors import ArtifactError, ConfigError


def explain(path: Path, overrides: Sequence[str] = ()) -> dict[str, Explanation]:
    """Name → blend: every stage `blend` of a recipe, or the one of a settings file, a stage's folder or its plan.json.

    Raises `ConfigError` or `ArtifactError` when there is none.
    """
    if path.is_dir() or path.suffix == ".json":
        if overrides:
            raise ConfigError(f"{overrides[0]}: {path} is done; overrides change settings, give a recipe")
        return {path.name if path.is_dir() else path.parent.name: explain_folder(path)}
    data = configs.read_yaml(path)
    if "stages" not in data:
        return {path.stem: explain_config(configs.load(BlendConfig, path, overrides))}
    blends = {step.name: step.config for step in recipe.load(path, overrides)[1] if step.stage == "blend"}
    if not blends:
        raise ArtifactError(f"{path}: has no stage blend; give a recipe that has one, or a blend's folder")
    return {name: explain_config(config) for name, config in blends.items()}  # type: ignore[arg-type]


def search(
    table: Path, path: Path, overrides: Sequence[str] = (), wanted: Mapping[str, float] | None = None, draws: int = 48,
    seed: int = 0,
) -> Proposed:  # fmt: skip
    """A better blend in the place of the one that `path` plans, from the runs in `table`.

    Raises `ConfigError` where `path` plans several blends, and as `data.blend_search.search` does.
    """
    found = explain(path, overrides)
    if len(found) > 1:
        raise ConfigError(f"{path}: plans {len(found)} blends ({', '.join(found)}); give the settings of one")
    [planned] = found.values()
    return propose(table, planned, wanted or {}, draws, seed)


def draw(blends: Mapping[str, Explanation], file: Path) -> None:
    """Draw the shares of each phase as stacked bars, to an SVG. Raises `ConfigError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(f"--picture needs {error.name}: pip install 'bloomery[claims]'") from None
    figure = Figure(figsize=(8, 1.2 + 0.5 * sum(len(blend.phase_ends) for blend in blends.values())))
    axis = figure.subplots()
    for name, blend in blends.items():
        found = blend.as_json()
        for number, phase in enumerate(found["phases"], 1):
            left = 0.0
            for place, (source, read) in enumerate(found["sources"].items()):
                width = read["phases"][number - 1]["tokens"] / phase["tokens"]
                label = source if number == 1 else None
                color, shade = COLORS[place % len(COLORS)], 1 / (1 + place // len(COLORS))
                axis.barh(f"{name}, phase {number}", width, left=left, color=color, alpha=shade, label=label)
                left += width
    axis.invert_yaxis()
    axis.set(xlabel="share of the phase's tokens", xlim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.set_layout_engine("constrained")
    file.parent.mkdir(parents=True, exist_ok=True)
    save(figure, file)
