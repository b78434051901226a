"""A run folder written by hand: what a whole life leaves on disk, with numbers that can be checked on the page."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

STARTED = 1_760_000_000.0
SAMPLES_PER_PROBLEM = 4


class LifeOnDisk:
    """Writes stages into `path`, each an hour of the clock after the other."""

    def __init__(self, path: Path):
        self.path, self.clock = path, STARTED

    def stage(self, name, stage, kind, reads=(), seconds=12.5, summary=None, config="seed: 0\n", metrics=(), done=True):
        """One stage folder; `reads` names the stages it read, `done=False` leaves the manifest out."""
        folder = self.path / name
        folder.mkdir(parents=True)
        inputs = {f"inputs.{source}": f"key-{source}" for source in reads}
        (folder / "config.yaml").write_text(config)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        (folder / ".state.json").write_text(json.dumps({"stage": stage, "key": f"key-{name}", "inputs": inputs}))
        self.clock += 3600
        manifest = {
            "kind": kind, "stage": stage, "key": f"key-{name}", "inputs": inputs, "version": "0.1.0",
            "seed": 0, "world": 1, "seconds": seconds, "finished": self.clock, "summary": summary or {},
        }  # fmt: skip
        if done:
            (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    def weights(self, folder, hidden=96):
        """A model folder with 3 tensors: 2·hidden² + hidden parameters in float32."""
        (folder / "model").mkdir()
        tensors = {"up": np.zeros((hidden, hidden)), "down": np.zeros((hidden, hidden)), "norm": np.zeros(hidden)}
        save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model" / "model.safetensors")
        config = {"model_type": "nemotron_h", "num_hidden_layers": 8, "hidden_size": hidden, "vocab_size": 1024}
        (folder / "model" / "config.json").write_text(json.dumps(config | {"hybrid_override_pattern": "M-M-*-M-"}))

    def evaluation(self, name, model, chance, completions=None, problems=60):
        """An evaluation right in about `chance` of its samples; `completions` overrides texts by problem."""
        generator, rows = random.Random(name), []
        for problem in range(problems):
            a, b, c = (random.Random(problem * 3 + i).randint(2, 40) for i in range(3))
            for sample in range(SAMPLES_PER_PROBLEM):
                score = None if problem == 7 and sample == 0 else float(generator.random() < chance)
                written = a * b - c if score else a * b + c
                text = f"{a} * {b} = {a * b}; then {c} less is {written}. The answer is {written}."
                reason = "the verifier hit its deadline of 10 s" if score is None else "equal" if score else "different"
                if problem == 5 and not score:
                    text, reason = f"{a} * {b} is near {a * b + 1}, so I guess", "no answer found"
                rows.append({
                    "task": "arithmetic", "id": f"arithmetic-{problem:04d}", "source": "chains",
                    "prompt": [{"role": "user", "content": f"What is {a} * {b} - {c}?"}],
                    "completion": (completions or {}).get(problem, text), "answer": str(a * b - c), "score": score,
                    "status": "error" if score is None else "judged", "reason": reason, "tokens": len(text) // 3,
                    "finish_reason": "length" if problem == 5 else "stop", "sample": sample,
                })  # fmt: skip
        folder = self.stage(name, "evaluate", "evaluation", [model], summary={"accuracy": chance, "problems": problems})
        pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
        (folder / "report.json").write_text(json.dumps(_report(rows, problems)))
        return folder


def _report(rows, problems):
    judged = {}
    for row in rows:
        if row["score"] is not None:
            judged.setdefault(row["id"], []).append(row["score"])
    means = [sum(scores) / len(scores) for scores in judged.values()]
    anys = [max(scores) for scores in judged.values()]
    tokens = [row["tokens"] for row in rows]

    def entry(metric, values):
        return {"task": "arithmetic", "version": 1, "metric": metric, "value": float(np.mean(values)), "n": problems,
                "stderr": float(np.std(values, ddof=1) / math.sqrt(len(values)))}  # fmt: skip

    return [
        entry("tokens_per_answer", tokens),
        entry("maj@4", [m > 0.5 for m in means]),
        entry("pass@4", anys),
        entry("avg@4", means),
    ]


def pretraining(steps=300):
    """Loss rows as a training stage logs them, with validation every 25 steps."""
    noise = random.Random(0)
    for step in range(1, steps + 1):
        loss = 1.1 + 5.5 * math.exp(-step / 45) + noise.gauss(0, 0.08)
        rate = 3e-3 * min(1, step / 20) * min(1, (steps - step) / 60 + 0.02)
        row = {"step": step, "loss": loss, "grad_norm": 0.4 + 3 * math.exp(-step / 20) + abs(noise.gauss(0, 0.06)),
               "learning_rate": rate, "tokens": 16_384, "seconds": 0.41 + abs(noise.gauss(0, 0.02))}  # fmt: skip
        yield row | ({"validation_loss": 1.15 + 5.5 * math.exp(-step / 45)} if step % 25 == 0 else {})


def reinforcement(steps=60):
    """Rows as the RL stage logs them."""
    noise = random.Random(1)
    for step in range(1, steps + 1):
        rise = 1 - math.exp(-step / 18)
        accuracy, reward = (0.24 + 0.42 * rise + noise.gauss(0, 0.025) for _ in range(2))
        yield {
            "step": step, "loss": noise.gauss(0, 0.01), "accuracy": accuracy, "reward": reward,
            "entropy": 0.42 - 0.2 * rise + noise.gauss(0, 0.01), "length": 14 + 15 * rise + noise.gauss(0, 0.6),
            "grad_norm": 0.5 + abs(noise.gauss(0, 0.15)), "learning_rate": 1e-4 * min(1, step / 10),
            "truncated": 0.02, "degenerate": 0.3 + 0.2 * rise, "tokens": 9_000 + int(6_000 * rise),
            "seconds": 2.5 + noise.random(),
        }  # fmt: skip


def whole_life(path: Path) -> LifeOnDisk:
    """Corpora, tokenizer, blend, three models, three evaluations, and an export that was cut."""
    life = LifeOnDisk(path)
    sources = {
        "stdlib": {"documents": 4_210, "tokens": 2_913_004, "planned": 0.6, "read": 0.598, "epochs": 1.27},
        "procedural": {"documents": 12_000, "tokens": 1_204_118, "planned": 0.4, "read": 0.402, "epochs": 1.73},
    }
    life.stage(
        "corpora",
        "prepare",
        "documents",
        seconds=21.4,
        summary={
            "documents": 16_210,
            "dropped": 391,
            "sources": {k: {"documents": v["documents"]} for k, v in sources.items()},
        },
    )
    life.stage("tokenizer", "tokenizer", "tokenizer", ["corpora"], 6.2, {"vocab_size": 1024})
    life.stage(
        "blend",
        "blend",
        "tokens",
        ["corpora", "tokenizer"],
        9.8,
        {"tokens": 4_915_200, "rows": 9_600, "sources": sources},
    )
    life.weights(
        life.stage(
            "base",
            "pretrain",
            "model",
            ["blend", "tokenizer"],
            131.0,
            {"validation_loss": 1.153, "loss": 1.1, "tokens": 4_915_200, "best": {"step": 300}},
            "seed: 0\nloop:\n  max_steps: 300\n  learning_rate: 0.003\nmodel:\n  pattern: M-M-*-M-\n",
            pretraining(),
        )
    )
    life.stage("lessons", "prepare", "messages", seconds=4.0, summary={"examples": 8_000})
    life.weights(
        life.stage("sft", "sft", "model", ["base", "lessons"], 61.3, {"loss": 0.31}, metrics=list(pretraining(80)))
    )
    life.stage("problems", "prepare", "prompts", seconds=1.1, summary={"prompts": 2_048})
    life.weights(
        life.stage("rl", "rl", "model", ["sft", "problems"], 144.9, {"accuracy": 0.66}, metrics=list(reinforcement()))
    )
    life.evaluation("evaluate_base", "base", 0.02)
    life.evaluation("evaluate_sft", "sft", 0.3, {1: "<script>alert('owned')</script> & <b>bold</b>"})
    life.evaluation("evaluate_rl", "rl", 0.66)
    life.stage("export", "export", "model", ["rl"], metrics=[], done=False)
    return life
