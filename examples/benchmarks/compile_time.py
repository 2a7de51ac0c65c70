"""What the pass adds to a compile: a Llama of several depths, cold and from the caches, with and without mst_fx.

    python examples/benchmarks/compile_time.py                                       # anywhere; two cores: an hour
    python examples/benchmarks/compile_time.py --layers 4 --lengths fixed --warms 1  # about two minutes

The model has few features: nothing but the compile costs. Every compile has a process of its own, from `import mst_fx`
and the call of torch.compile to the end of the first step, forward and backward; what the compiler imports is imported
before. Cold ones start from an empty cache directory, warm ones from what the cold one left there. "fixed" compiles for
one length, "varying" for any (`mark_dynamic`). Seconds are those of the processors, of the process and of the compilers
that it starts, so that others on the machine count little; methods take turns, the best of each counts. Prints a
Markdown table:

s               seconds of the compile, and the ratio to plain torch.compile
Dynamo          capture, guards, and the step itself
pass            mst_fx, without what Inductor does for its loops
AOTAutograd     traces and caches
Inductor        with the C++ compiler or Triton; "of it bodies": what Inductor does for the bodies of loops in Python
process         seconds of the whole process, imports included, and the ratio to plain torch.compile
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

METHODS = ("torch.compile", "mst_fx", "enable")
LENGTHS = ("fixed", "varying")
OPTIONS = {"min_bytes": 0, "num_chunks": 4, "strict": True}
TOKENS = 512


@dataclass(frozen=True)
class Compile:
    """Seconds of one process, and whether AOTAutograd's cache had the graph."""

    total: float
    dynamo: float
    in_pass: float
    aot: float
    inductor: float
    bodies: float
    process: float
    hit: bool


def seconds() -> float:
    """Processor seconds of this process, and of those that it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Clock:
    """Adds up the seconds of functions, by a name for several; one inside another of the same name counts once."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._running: list[str] = []

    def watch(self, owner: Any, function: str, *names: str, inside: str | None = None) -> None:
        """Count a function under these names, and under the last one only while `inside` runs."""
        method: Callable[..., Any] = getattr(owner, function)

        def run(*args: Any, **kwargs: Any) -> Any:
            counted = [name for name in names if name not in self._running]
            if inside is not None and inside not in self._running:
                counted = counted[:-1]
            start = seconds()
            self._running += counted
            try:
                return method(*args, **kwargs)
            finally:
                for name in counted:
                    self._running.remove(name)
                    self.spent[name] = self.spent.get(name, 0.0) + seconds() - start

        setattr(owner, function, run)

    def of(self, name: str) -> float:
        """Return the seconds that a name has."""
        return self.spent.get(name, 0.0)


def compile_here(method: str, layers: int, lengths: str) -> Compile:
    """Compile and run one step in this process."""
    import torch
    import torch._inductor.compile_fx as compile_fx
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.utils import counters

    model, ids = model_and_ids(layers)
    if lengths == "varying":
        torch._dynamo.mark_dynamic(ids, 1)
    clock = Clock()
    clock.watch(OutputGraph, "call_user_compiler", "backend")
    clock.watch(compile_fx, "fx_codegen_and_compile", "inductor", "inductor in backend", inside="backend")
    start = seconds()
    how: dict[str, Any] = {"backend": "mst_fx", "options": OPTIONS} if method == "mst_fx" else {}
    if method != "torch.compile":
        watched_pass(clock, enable=method == "enable")
    compiled = torch.compile(lambda ids: model(input_ids=ids, labels=ids).loss, **how)
    compiled(ids).backward()
    if ids.is_cuda:
        torch.cuda.synchronize()
    total, process = seconds() - start, seconds()
    in_pass, inductor, inner = clock.of("pass"), clock.of("inductor"), clock.of("inductor in backend")
    return Compile(
        total=total,
        dynamo=total - clock.of("import") - clock.of("backend") - (inductor - inner),
        in_pass=in_pass + clock.of("import"),
        aot=clock.of("backend") - in_pass - inner,
        inductor=inductor,
        bodies=clock.of("bodies"),
        process=process,
        hit=counters["aot_autograd"]["autograd_cache_hit"] > 0,
    )


def model_and_ids(layers: int) -> tuple[Any, Any]:
    """A Llama of few features, and a batch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device, dtype)
    return model, torch.randint(0, config.vocab_size, (1, TOKENS), device=device)


def watched_pass(clock: Clock, enable: bool) -> None:
    """Load mst_fx, and count what it does; with `enable`, let plain torch.compile go through it."""
    start = seconds()
    import mst_fx
    from mst_fx import pipeline

    if enable:
        mst_fx.enable(**OPTIONS)
    clock.spent["import"] = seconds() - start
    clock.watch(pipeline, "_engine", "pass")
    start = seconds()
    from mst_fx.engine import Engine
    from mst_fx.runtime import inductor_lowering

    clock.spent["import"] += seconds() - start
    clock.watch(Engine, "rewritten", "pass")
    clock.watch(inductor_lowering, "_compile_body", "bodies")
    clock.watch(inductor_lowering.MiniSequenceKernel, "codegen", "bodies")


def compile_apart(method: str, layers: int, lengths: str, directory: str) -> Compile:
    """The same in a new process with its caches in the directory."""
    command = [sys.executable, __file__, "--here", method, "--layers", str(layers), "--lengths", lengths]
    own = {"TORCHINDUCTOR_CACHE_DIR": directory, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return Compile(**json.loads(run.stdout.splitlines()[-1]))


def measure(layers: int, lengths: str, methods: list[str], colds: int, warms: int) -> list[str]:
    """Rows of the table for one depth."""
    found: dict[tuple[str, str], list[Compile]] = {}
    for _ in range(colds):
        with tempfile.TemporaryDirectory() as directory:
            for turn, method in ((turn, method) for turn in range(1 + warms) for method in methods):
                one = compile_apart(method, layers, lengths, os.path.join(directory, method))
                print(layers, lengths, method, one, file=sys.stderr, flush=True)
                found.setdefault(("warm" if turn else "cold", method), []).append(one)
    rows = []
    for start in ("cold", "warm") if warms else ("cold",):
        best = {method: min(found[start, method], key=lambda one: one.total) for method in methods}
        process = {method: min(one.process for one in found[start, method]) for method in methods}
        plain, whole = best[methods[0]].total, process[methods[0]]
        for method, one in best.items():
            shares = (one.dynamo, one.in_pass, one.aot, one.inductor)
            cells = [str(layers), lengths, start, method, f"{one.total:.2f}", f"{one.total / plain:.2f}"]
            cells += [f"{share:.2f}" for share in shares] + [f"{one.bodies:.2f}"]
            cells += [f"{process[method]:.1f}", f"{process[method] / whole:.2f}", "hit" if one.hit else "-"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def write_bytecode() -> None:
    """Let mst_fx have its bytecode, as an installed package has: to make it takes longer than the pass."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    import mst_fx.engine
    import mst_fx.runtime.inductor_lowering  # noqa: F401


HEADER = (
    "| layers | lengths | start | method | s | to plain | Dynamo | pass | AOTAutograd | Inductor | of it bodies "
    "| process | to plain | cache |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--lengths", choices=LENGTHS, nargs="+", default=list(LENGTHS))
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="ratios are to the first")
    parser.add_argument("--colds", type=int, default=1, help="cold compiles of each method")
    parser.add_argument("--warms", type=int, default=3, help="warm ones after each of them")
    parser.add_argument("--here", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(vars(compile_here(args.here, args.layers[0], args.lengths[0]))))
        return
    write_bytecode()
    print(HEADER)
    for lengths in args.lengths:
        for layers in args.layers:
            print("\n".join(measure(layers, lengths, args.methods, args.colds, args.warms)), flush=True)


if __name__ == "__main__":
    main()
