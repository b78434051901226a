"""lm-eval's `local-completions` against `bloomery serve`: its log-likelihoods and texts are the engine's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_serve import WINDOW, process

from bloomery.generate import Engine, Request, SamplingParams
from bloomery.model import hf
from bloomery.serve import describe
from bloomery.train.model_folder import open_model

ROOT = Path(__file__).parent.parent
QUESTIONS = [{"question": f"{a}+{b}=", "choices": [str(a + b), str(a), "\\boxed"]} for a in range(4) for b in range(2)]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICE = 'doc_to_choice: "{{choices}}"\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n'
WRITE = 'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs: {until: ["=", "4"], max_gen_toks: 9, temperature: 0}\n'


def python_with_lm_eval() -> str:
    """The peers' interpreter; installed at first use."""
    command = [sys.executable, "-c", "from bench.peers import install; print(install())"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]


def evaluated(url: str, model: Path, folder: Path) -> dict[str, list[dict]]:
    """Runs both tasks; the logged samples of each."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, kind, rest in (("choose", "multiple_choice", CHOICE), ("write", "generate_until", WRITE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, data=data) + rest)
    arguments = {
        "base_url": f"{url}/completions", "model": "tiny", "tokenizer": model, "tokenizer_backend": "huggingface",
        "num_concurrent": 4, "max_length": WINDOW,
    }  # fmt: skip
    command = [
        python_with_lm_eval(), "-m", "lm_eval", "--model", "local-completions", "--tasks", "choose,write",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()), "--include_path", str(folder),
        "--output_path", str(folder / "out"), "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {
        name: [json.loads(line) for file in folder.glob(f"out/**/samples_{name}_*.jsonl") for line in file.open()]
        for name in ("choose", "write")
    }


@pytest.mark.slow
def test_lm_eval_sees_what_the_engine_sees(tiny_world, tmp_path):
    served = describe(open_model(tiny_world.model), "tiny", WINDOW)
    engine = Engine(hf.load(tiny_world.model), max_batch=4, max_tokens=WINDOW, decode=served.decode)
    with process(tiny_world.model, "--name", "tiny") as (_, url):
        samples = evaluated(url, tiny_world.model, tmp_path)
    assert len(samples["choose"]) == len(samples["write"]) == len(QUESTIONS)
    for sample in samples["choose"]:
        for choice, [[logprob, greedy]] in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            expected, likeliest = loglikelihood(engine, served, sample["doc"]["question"], f" {choice}")
            assert float(logprob) == pytest.approx(expected, abs=1e-4)
            assert (greedy in (True, "True")) == likeliest
    for sample in samples["write"]:
        params = SamplingParams(max_new_tokens=9, temperature=0, stop=("=", "4"), stop_token_ids=served.stop_token_ids)
        [expected] = engine.generate([Request(served.encode(sample["doc"]["question"]), params)])
        assert sample["resps"] == [[expected.text]]


def loglikelihood(engine, served, context: str, continuation: str) -> tuple[float, bool]:
    """Sum over the continuation, and whether each of its tokens is the likeliest."""
    ids, start = served.encode(context + continuation), len(served.encode(context))
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=True, top_logprobs=1)
    [scored] = engine.generate([Request(ids, params)])
    best = [next(iter(top)) for top in scored.prompt_top_logprobs[start:]]
    return sum(scored.prompt_logprobs[start:]), best == ids[start:]
