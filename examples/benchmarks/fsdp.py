"""Llama-3-8B on several GPUs: FSDP2 alone, and with a sequence or the layers shared by all ranks.

    python examples/benchmarks/fsdp.py                                     # all GPUs: every row, one after the other
    python examples/benchmarks/fsdp.py --rows fsdp --lengths 16384 65536   # a sequence for each rank, these tokens each
    python examples/benchmarks/fsdp.py --rows ulysses ring --methods mst_fx    # the longest sequence that trains
    python examples/benchmarks/fsdp.py --rows ulysses --lengths 131072     # one length, the methods in turn
    python examples/benchmarks/fsdp.py --small                             # anywhere: tiny shapes, two processes, gloo

All 32 layers, batch 1, random weights; weights, gradients and AdamW's state in bfloat16, spread over all ranks. Each
layer is a part that FSDP gathers, and so are the embedding and the head with the last norm. The rows:

    fsdp     a sequence for each rank
    ulysses  one sequence for all ranks: a slice of its tokens each, a part of the heads each in attention
    ring     one sequence for all ranks: a slice of its tokens each; torch's `context_parallel` (GPUs only)
    tensor   one sequence, and the weights of the layers, for all ranks: tensor parallel, tokens in slices between

The methods, all with checkpointed layers:

    torch.compile  layers compiled one by one, with their checkpointing; norm, head and loss together
    mst_fx         the same with backend=mst_fx.backend
    eager recipe   that of guides to long contexts: nothing compiled; inputs of layers in pinned memory of the host;
                   MLPs in tiles of 16,384 tokens and the loss in chunks of 2,048, which backward makes again

Methods take turns in one process, after a warm-up each, at the lengths of `--lengths`; without these, `ulysses` and
`ring` look for the longest sequence that trains, each method in processes of its own: a line through the peaks of two
short lengths says where memory ends, and lengths near by are tried, in a new process where one has not fitted. All
methods train the same weights, at a learning rate of 0, so their losses are the same. Peaks are the largest of all
ranks, weights and optimizer included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from fsdp_methods import METHODS, Sharded
from longest import LLAMA, TINY
from train_fsdp import Ranks, build_optimizer, timed_step

import mst_fx

WAYS = {"fsdp": "", "ulysses": "sequence", "ring": "context", "tensor": "tensor"}
LENGTHS = {"fsdp": [16384, 65536], "ulysses": [], "ring": [], "tensor": [65536]}
SMALL_LENGTHS = {"fsdp": [48, 96], "ulysses": [], "ring": [], "tensor": [48]}
SHORT, SMALL_SHORT = (32768, 65536), (48, 96)
"""Two lengths whose peaks say what the longest one may be."""
GRAIN, SPARE_GIB = 4096, 0.5
"""The longest length is a multiple of this, and what memory it leaves."""
TOO_LONG = "does not fit"


@dataclass(frozen=True)
class Row:
    """One method at one length.

    Attributes:
        row, method, tokens: what was run; tokens are those of one sequence.
        layers, ranks: of the model, that shared it.
        seconds: median of the steps.
        rate: tokens a second, of all ranks together.
        peak_gib: the largest of all ranks, weights and optimizer included.
        loss: of the last step.
        looped: regions that mst_fx has looped in this process.
        device: that it ran on.
        failed: why it did not run, "" where it did.
    """

    row: str
    method: str
    tokens: int
    layers: int
    ranks: int
    seconds: float = 0.0
    rate: float = 0.0
    peak_gib: float = 0.0
    loss: float = 0.0
    looped: int = 0
    device: str = ""
    failed: str = ""

    def __str__(self) -> str:
        start = f"| {self.row} | {self.tokens:,} | {self.method} |"
        if self.failed:
            return f"{start} {self.failed} | | | |"
        return f"{start} {self.seconds:.2f} | {self.rate:,.0f} | {self.peak_gib:.1f} | {self.loss:.4f} |"


# On each rank


class Rank:
    """The model on this rank, and steps of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.cap_gib = args, torch.device("cpu"), 0.0
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
            whole = torch.cuda.get_device_properties(self.device).total_memory
            self.cap_gib = min(whole, args.cap * 1e9 or whole) / 2**30
            torch.cuda.set_per_process_memory_fraction(self.cap_gib * 2**30 / whole)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        way = WAYS[args.here]
        self.ranks = Ranks.of(self.device, way, args.ranks if way else 1)
        preset = TINY if args.small else replace(LLAMA, layers=args.layers)
        self.vocab, self.layers = preset.vocab, preset.layers
        self.dynamic = args.here != "tensor" and not args.static  # DTensors have fixed lengths
        chunk = {"chunk_tokens": 16} if args.small else {}
        self.model = Sharded(preset, self.device, self.ranks, dynamic=self.dynamic, **chunk)
        self.optimizer = build_optimizer(self.model, rate=0.0)  # so that all methods have the same loss

    def step(self, method: str, tokens: int) -> tuple[float, float, float]:
        """Train for a step; return seconds, the largest peak (GiB) and the loss of all ranks."""
        self.model.use(method)
        torch.manual_seed(self.ranks.data.get_local_rank())
        ids = torch.randint(self.vocab, (1, tokens), device=self.device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        loss, seconds = timed_step(self.model, self.optimizer, ids, self.ranks)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        largest = torch.tensor(peak, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return seconds, largest.item(), loss

    def measured(self, tokens: int, warm_up: bool = True) -> list[Row]:
        """A row for each method at one length; they take turns."""
        steps: dict[str, list[tuple[float, float, float]]] = {method: [] for method in self.args.methods}
        for turn in range(self.args.rounds + warm_up):
            for method, taken in steps.items():
                found = self.attempt(method, tokens)
                if turn or not warm_up:
                    taken.append(found)
        return [self.of(method, tokens, taken) for method, taken in steps.items()]

    def attempt(self, method: str, tokens: int) -> tuple[float, float, float]:
        """A step; where it fails, this process ends: the other ranks wait for it, and torchrun ends them."""
        try:
            return self.step(method, tokens)
        except Exception as error:
            traceback.print_exc()
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
            why = TOO_LONG if out_of_memory else f"failed: {type(error).__name__}: {str(error)[:100]}".splitlines()[0]
            self.tell(replace(self.row(method, tokens), failed=why))
            os._exit(1)

    def of(self, method: str, tokens: int, taken: Sequence[tuple[float, float, float]]) -> Row:
        """The row of some steps."""
        seconds, peaks, losses = zip(*taken, strict=True)
        median = statistics.median(seconds)
        rate = self.ranks.data.size() * tokens / median
        looped = sum(len(report.regions) for report in mst_fx.reports()) if method == "mst_fx" else 0
        row = self.row(method, tokens)
        return replace(row, seconds=median, rate=rate, peak_gib=max(peaks), loss=losses[-1], looped=looped)

    def row(self, method: str, tokens: int) -> Row:
        """A row without numbers."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        return Row(self.args.here, method, tokens, self.layers, dist.get_world_size(), device=device)

    def tell(self, row: Row) -> None:
        """Add a line to the file that the first process reads."""
        with open(self.args.json, "a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def run_here(args: argparse.Namespace) -> None:
    """All lengths of one row, on this rank; 0 stands for the length that those before it lead to."""
    rank = Rank(args)
    rows: list[Row] = []
    for tokens in args.lengths:
        found = rank.measured(
            tokens or min(guess(rows, rank.cap_gib), args.most), warm_up=bool(tokens) or not rank.dynamic
        )
        rows += found
        if dist.get_rank() == 0:
            for row in found:
                rank.tell(row)
    if dist.get_rank() == 0:
        print(mst_fx.summary(), file=sys.stderr)
    dist.destroy_process_group()


def guess(rows: Sequence[Row], cap_gib: float) -> int:
    """The length at which a line through the last two peaks leaves no memory; twice the last one without peaks."""
    before, last = sorted((row for row in rows if not row.failed), key=lambda row: row.tokens)[-2:]
    slope = (last.peak_gib - before.peak_gib) / (last.tokens - before.tokens)
    if slope <= 0:
        return 2 * last.tokens
    return int(last.tokens + (cap_gib - SPARE_GIB - last.peak_gib) / slope) // GRAIN * GRAIN


# In the first process


def launch(row: str, methods: Sequence[str], lengths: Sequence[int], args: argparse.Namespace) -> list[Row]:
    """The rows of one run of all ranks."""
    path = Path(args.json)
    known = len(path.read_text().splitlines()) if path.exists() else 0
    here = ["--here", row, "--methods", *methods, "--lengths", *map(str, lengths), "--json", str(path)]
    here += [
        f"--ranks={args.ranks}",
        f"--cap={args.cap}",
        f"--most={args.most}",
        f"--rounds={args.rounds}",
        f"--layers={args.layers}",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    command += [__file__, *here, *["--small"] * args.small, *["--static"] * args.static]
    environment = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1", **os.environ}  # no NVLink multicast
    with open(args.log or os.devnull, "a") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            run.wait(args.limit)
            ended = f"failed: exit status {run.returncode}"
        except subprocess.TimeoutExpired:
            run.terminate()  # torchrun ends its ranks
            run.wait()
            ended = f"more than {args.limit:.0f} s"
    lines = path.read_text().splitlines()[known:] if path.exists() else []
    first: dict[tuple[str, int], Row] = {}  # other ranks fail behind the first one, for its sake
    for found in (Row(**json.loads(line)) for line in lines):
        first.setdefault((found.method, found.tokens), found)
    rows = sorted(first.values(), key=lambda found: found.tokens)
    if run.returncode and not any(found.failed for found in rows):
        told = {found.tokens for found in rows}
        tokens = next((each for each in lengths if each not in told), 0)
        rows += [Row(row, method, tokens, args.layers, args.ranks, failed=ended) for method in methods]
    return rows


def at_lengths(row: str, lengths: Sequence[int], args: argparse.Namespace) -> list[Row]:
    """All methods in one run; what fails is left out of the next one, which goes on there."""
    methods, rows = list(args.methods), list[Row]()
    while methods and lengths:
        found = launch(row, methods, lengths, args)
        rows += found
        failed = {each.method for each in found if each.failed}
        if not failed:
            break
        methods = [method for method in methods if method not in failed]
        done = {each.tokens for each in found if not each.failed}
        lengths = [tokens for tokens in lengths if tokens not in done]
    return rows


def longest(row: str, method: str, args: argparse.Namespace) -> list[Row]:
    """The rows of one method up to the longest length that trains, as far as `--trials` lead."""
    short = SMALL_SHORT if args.small else SHORT
    alone = argparse.Namespace(**{**vars(args), "rounds": 1})
    rows = launch(row, [method], [*short, 0], alone)
    for _ in range(args.trials - 1):
        failed = min((each.tokens for each in rows if each.failed == TOO_LONG), default=0)
        best = max((each.tokens for each in rows if not each.failed), default=0)
        if not failed or failed - best <= GRAIN:
            break
        tokens = max(int(failed * 0.95) // GRAIN * GRAIN, (failed + best) // 2 if best > short[-1] else 0)
        rows += [each for each in launch(row, [method], [short[0], tokens], alone) if each.tokens != short[0]]
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--rows", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="of a sequence")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()), help="2, or all GPUs")
    parser.add_argument("--cap", type=float, default=80.0, help="GB of each device that may be used; 0 for all")
    parser.add_argument("--rounds", type=int, default=2, help="steps of each method that are timed")
    parser.add_argument("--most", type=int, default=262144, metavar="TOKENS", help="the longest sequence to try")
    parser.add_argument("--static", action="store_true", help="compile each length by itself")
    parser.add_argument("--trials", type=int, default=3, help="processes that look for the longest sequence")
    parser.add_argument("--limit", type=float, default=500, help="seconds for one run of all ranks")
    parser.add_argument("--json", help="append each row to this file as it is measured, a line of JSON each")
    parser.add_argument("--log", help="append what the ranks print to this file, mst_fx's summary too")
    parser.add_argument("--here", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.here:
        return run_here(args)
    with tempfile.TemporaryDirectory() as folder:
        args.json = args.json or str(Path(folder, "rows.json"))
        shapes = TINY if args.small else replace(LLAMA, layers=args.layers)
        print(f"{shapes.layers} layers, {args.ranks} ranks, {shapes.dtype}, torch {torch.__version__}\n")
        print("| | tokens | method | s a step | tokens/s | peak GiB a rank | loss |\n|---|---|---|---|---|---|---|")
        for row in args.rows:
            lengths = args.lengths or (SMALL_LENGTHS if args.small else LENGTHS)[row]
            if lengths:
                print(*at_lengths(row, lengths, args), sep="\n", flush=True)
                continue
            for method in args.methods:
                print(*longest(row, method, args), sep="\n", flush=True)


if __name__ == "__main__":
    main()
