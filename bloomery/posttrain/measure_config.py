"""The settings of measuring how hard prompts are, without what samples them."""

from pathlib import Path

from bloomery.config import RUN_ONLY, Config, Field, ModelDir


class Endpoint(Config):
    """An endpoint with OpenAI's API that takes token ids (vLLM, SGLang, `bloomery serve`)."""

    base_url: str = Field(description="address, for example http://host:8000/v1", json_schema_extra=RUN_ONLY)
    model: str = Field(description="name of the model there")
    concurrency: int = Field(default=64, gt=0, description="requests in flight", json_schema_extra=RUN_ONLY)


class MeasureConfig(Config):
    """Samples of a model, by which prompts are chosen: the smaller one of Nemotron-CrossThink's difficulty filter."""

    model: ModelDir = Field(description="the model; of an endpoint's its tokenizer and sizes are read, not its weights")
    endpoint: Endpoint | None = Field(default=None, description="where it is served; the engine here where not given")
    samples: int = Field(default=8, gt=0, description="completions of each prompt")
    max_new_tokens: int = Field(description="longest completion, tokens", gt=0)
    temperature: float = Field(default=1.0, gt=0, description="divides the logits")
    seed: int = Field(default=0, description="seed of the sampling")
    require_think: bool = Field(default=False, description="an answer counts only behind a </think>")
    max_batch: int = Field(default=256, gt=0, description="sequences decoded at a time", json_schema_extra=RUN_ONLY)
    workers: int = Field(default=2, gt=0, description="processes that judge", json_schema_extra=RUN_ONLY)

    @property
    def name(self) -> str:
        """How the model is called in what was measured by it."""
        return self.endpoint.model if self.endpoint else str(Path(self.model))
