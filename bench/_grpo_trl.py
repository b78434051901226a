"""The peer of `bench.grpo`: TRL's GRPOTrainer, one optimizer step for each line on standard input.

Runs in the peers' environment. Arguments: a JSON object with `model` (folder), `prompts`, `group_size`, `new_tokens`,
`learning_rate`, `max_steps`, `micro_batch_size` and `extra` (more settings of GRPOConfig).
"""

import json
import logging
import sys
import time
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback


def reward(completions: list[str], **_: Any) -> list[float]:
    """1 where the bytes of the text add up to an even number."""
    return [1.0 - sum(text.encode()) % 2 for text in completions]


class Turns(TrainerCallback):
    """Waits for a line before each step and reports its time after; rollout, reward and update lie between."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        sys.stdin.readline()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self.started
        lengths = self.trainer._metrics["train"]["completions/mean_length"]
        versions = {package.__name__: package.__version__ for package in (torch, transformers, trl)}
        print(json.dumps({"seconds": seconds, "mean_length": lengths[-1], "versions": versions}), flush=True)


def run(settings: dict[str, Any]) -> None:
    """Train until the parent has heard enough."""
    torch.set_num_threads(1)
    prompts, micro_batch_size = settings["prompts"], settings["micro_batch_size"]
    config = trl.GRPOConfig(
        output_dir="unused", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, max_steps=settings["max_steps"],
        learning_rate=settings["learning_rate"], lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch_fused", per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=len(prompts) * settings["group_size"] // micro_batch_size,
        num_generations=settings["group_size"], max_completion_length=settings["new_tokens"], temperature=1.0,
        beta=0.0, num_iterations=1, loss_type="dapo", scale_rewards="group", shuffle_dataset=False, **settings["extra"],
    )  # fmt: skip
    callback = Turns()
    callback.trainer = trl.GRPOTrainer(
        model=settings["model"], args=config, reward_funcs=reward, callbacks=[callback],
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts] * settings["max_steps"]),
    )  # fmt: skip
    callback.trainer.train()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    run(json.loads(sys.argv[1]))
