"""What the examples for trainers share: a tiny random model, a tokenizer and texts made here, and a comparison.

Nothing is downloaded, and nothing is drawn from another seed in the run with mst_fx than in the one without.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

import mst_fx

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = tuple(f"word{i}" for i in range(60))
VOCAB, LAYERS = 256, 2

STEPS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "optim": "sgd",  # whose steps are as large as the gradients: a wrong one shows in the next loss
    "learning_rate": 0.5,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
"""Arguments of a trainer of transformers or TRL: a few steps on a CPU, and a loss for each."""
LOOP_ALL: dict[str, Any] = {"min_bytes": 0, "num_chunks": 4}
"""Options of mst_fx for a model this small; by default the pass leaves it alone, since a loop would save nothing."""


@dataclass(frozen=True)
class Run:
    """One way to train, without mst_fx and with it.

    Attributes:
        title: what is trained.
        train: trains from the start and returns the loss of each step; whether to compile is its only argument.
        looped: the number of looped regions of each pattern, heads and MLPs.
        options: options of mst_fx beside `LOOP_ALL`.
        error: how far the losses may differ, relative to the larger of loss and 1; more in bfloat16.
    """

    title: str
    train: Callable[[bool], list[float]]
    looped: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    error: float = 2e-6


@dataclass(frozen=True)
class Compared:
    """The losses of both runs, and what mst_fx says about the second."""

    plain: list[float]
    ours: list[float]
    report: mst_fx.Report

    @property
    def difference(self) -> float:
        """The largest difference of two losses, relative to the larger of loss and 1."""
        return max(abs(a - b) / max(abs(a), 1) for a, b in zip(self.plain, self.ours, strict=True))

    @property
    def looped(self) -> dict[str, int]:
        """The number of looped regions of each pattern, in the largest graph."""
        return dict(Counter(region.pattern for region in self.report.regions))


def compared(run: Run) -> Compared:
    """Train twice: as it is, and compiled under mst_fx."""
    plain = run.train(False)
    before = len(mst_fx.reports())
    with mst_fx.enabled(**{**LOOP_ALL, **run.options}):
        ours = run.train(True)
    torch.compiler.reset()
    made = mst_fx.reports()[before:]
    return Compared(plain, ours, sum(made[1:], made[0]) if made else mst_fx.Report(graphs=0))


def main(runs: Sequence[Run]) -> None:
    """Compare and print each run."""
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    for name in ("transformers", "datasets", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for run in runs:
        found = compared(run)
        print(f"{run.title}: looped {found.looped}, losses differ by {found.difference:.1e}")
        print("    without mst_fx", *(f"{loss:.6f}" for loss in found.plain))
        print("    with mst_fx   ", *(f"{loss:.6f}" for loss in found.ours))


def model(kind: type = LlamaForCausalLM, **sizes: Any) -> Any:
    """Return a small Llama, the same at each call."""
    torch.manual_seed(0)
    widths = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "use_cache": False, **widths, **ends, **sizes}
    return kind(LlamaConfig(**shape))


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows these words."""
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    chat = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=known, chat_template=chat, **names)


def sentence(words: int, seed: int) -> str:
    """Return random words."""
    drawn = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return "".join(f" {WORDS[i]}" for i in drawn)


def texts(**columns: int) -> Dataset:
    """Return eight rows with a sentence of so many words in each column: all of one length, so one compile serves."""
    return Dataset.from_list(
        [
            {name: sentence(words, 8 * column + row) for column, (name, words) in enumerate(columns.items())}
            for row in range(8)
        ]
    )


def conversations() -> Dataset:
    """Return eight conversations of a question and an answer."""
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": row["asked"]}, {"role": "assistant", "content": row["said"]}]}
            for row in texts(asked=8, said=16)
        ]
    )


def tokens(rows: int = 8, length: int = 40) -> list[dict[str, torch.Tensor]]:
    """Return rows of token ids that are their own labels."""
    drawn = torch.randint(len(SPECIAL), VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in drawn]


def folder() -> str:
    """Return a new folder for what a trainer writes."""
    return tempfile.mkdtemp()


def losses(trainer: Trainer) -> list[float]:
    """Train, and return the loss of each step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
