"""What the pass adds to a compile: a Llama of several depths, cold and from the caches, with and without mst_fx.

    python examples/benchmarks/compile_time.py                   # a GPU: 8 and 32 layers, bfloat16
    python examples/benchmarks/compile_time.py --layers 2        # anywhere; a CPU takes minutes a layer

Every compile has a process of its own, from the call of torch.compile to the end of the first step, forward and
backward; what the compiler imports is imported before. Cold ones start from an empty cache directory, warm ones from
what the cold one left there; the methods run side by side, under the same load. "pass" is the share of mst_fx itself.
Prints a Markdown table of medians, also of the ratios to the plain torch.compile beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

METHODS = ("torch.compile", "mst_fx")


@dataclass(frozen=True)
class Compile:
    """Seconds of one process, and whether AOTAutograd's cache had the graph."""

    total: float
    in_pass: float
    hit: bool


def compile_here(method: str, layers: int) -> Compile:
    """Compile and run one step in this process."""
    import torch
    import torch._inductor.compile_fx
    from torch._dynamo.utils import counters
    from transformers import LlamaConfig, LlamaForCausalLM

    from mst_fx.engine import Engine

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32768,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device, dtype)
    ids = torch.randint(0, config.vocab_size, (1, 4096 if device == "cuda" else 512), device=device)
    seconds = [0.0]

    def timed(method):
        def run(*args):
            start = time.perf_counter()
            result = method(*args)
            seconds[0] += time.perf_counter() - start
            return result

        return run

    Engine.__init__, Engine.rewritten = timed(Engine.__init__), timed(Engine.rewritten)
    options = {"min_bytes": 0, "num_chunks": 4, "strict": True}
    how = {"backend": "mst_fx", "options": options} if method == "mst_fx" else {}
    start = time.perf_counter()
    compiled = torch.compile(lambda ids: model(input_ids=ids, labels=ids).loss, **how)
    compiled(ids).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    hit = counters["aot_autograd"]["autograd_cache_hit"] > 0
    return Compile(time.perf_counter() - start, seconds[0], hit)


def compile_apart(layers: int, directory: str, method: str) -> Compile:
    """The same in a new process with a cache of its own below the directory."""
    command = [sys.executable, __file__, "--here", method, "--layers", str(layers)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": os.path.join(directory, method)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return Compile(**json.loads(run.stdout.splitlines()[-1]))


def measure(layers: int, colds: int, warms: int) -> list[str]:
    """Rows of the table for one depth."""
    found: dict[tuple[str, str], list[Compile]] = {}
    for _ in range(colds):
        with tempfile.TemporaryDirectory() as directory:
            for turn in range(1 + warms):
                with ThreadPoolExecutor() as pool:
                    both = list(pool.map(partial(compile_apart, layers, directory), METHODS))
                for method, one in zip(METHODS, both, strict=True):
                    print(layers, method, one, file=sys.stderr, flush=True)
                    found.setdefault(("warm" if turn else "cold", method), []).append(one)
    rows = []
    for (start, method), compiles in sorted(found.items()):
        seconds = statistics.median(one.total for one in compiles)
        pairs = zip(compiles, found[start, METHODS[0]], strict=True)
        ratio = statistics.median(one.total / plain.total for one, plain in pairs)
        share = statistics.median(one.in_pass for one in compiles)
        hit = "hit" if all(one.hit for one in compiles) else "-"
        rows.append(f"| {layers} | {start} | {method} | {seconds:.2f} | {ratio:.3f} | {share:.2f} | {hit} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--colds", type=int, default=1, help="cold compiles of each method")
    parser.add_argument("--warms", type=int, default=3, help="warm ones after each of them")
    parser.add_argument("--here", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(vars(compile_here(args.here, args.layers[0]))))
        return
    print("| layers | start | method | s | ratio | pass s | AOTAutograd cache |\n|---|---|---|---|---|---|---|")
    for layers in args.layers:
        print("\n".join(measure(layers, args.colds, args.warms)), flush=True)


if __name__ == "__main__":
    main()
