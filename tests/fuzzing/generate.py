"""Whole programs."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from typing import Any

import torch

from fuzzing import harness
from fuzzing.drawer import Drawer
from fuzzing.experts import experts
from fuzzing.losses import head
from fuzzing.program import Program
from fuzzing.projections import narrowed, normed, stream, widened
from fuzzing.twins import twins
from fuzzing.wide import wide_steps

INPUT_WRITES = (
    "{x}.mul_(2)",
    "{x}[..., 0] = 0",
    "{x} += 1",
    "with torch.no_grad():\n    {x}.mul_(2)",
    "{x}.data.add_(1)",
)
READ_FIRST = (
    "{y}.clone()", "{y} * 1.5", "{y}.detach().clone()", "{y}.sum()", "{y}.exp()", "{y}.detach()", "{y}.view(-1)",
)  # fmt: skip
WRITTEN_BEHIND = (
    "{y}.mul_(2)", "{y} /= 4", "{y}.add_(1)", "with torch.no_grad():\n    {y}.zero_()", "{y}.detach().mul_(3)",
    "with torch.no_grad():\n    torch._foreach_mul_([{y}], 2.0)", "F.relu({y}, True)",
    "F.relu(input={y}, inplace=True)",
)  # fmt: skip
WRITTEN_INTO = (
    "{v} = torch.zeros_like({y})\n{v}[:] = {y}", "{v} = {y}.detach() * 2\n{v}[:1] = {y}[:1]",
    "{v} = torch.empty_like({y})\n{v}[..., :1] = {y}[..., :1]\n{v}[..., 1:] = {y}[..., 1:]",
    "{v} = torch.zeros_like({y})\n{v}.add_({y})", "{v} = {y} * 1\nwith torch.no_grad():\n    {v}[:1] = {y}[:1] * 2",
    "{v} = torch.zeros_like({y})\nfor k in range({y}.shape[0]):\n    {v}[k] = {y}[k]",
)  # fmt: skip
DATA_BEHIND = ("{w}.data.mul_(0.5)", "{w}.data.clamp_(-0.1, 0.1)", "torch._foreach_mul_([{w}.data], 0.5)")
REDUCED = (
    "{v}.sum()", "{v}.mean(-1)", "{v}.sum(0).t().tanh()", "{v}.sum((0, 1)).tanh()", "{v}[0]", "{v}.square().mean()",
    "{v}.amax(-1)", "{v}.norm()", "{v}.unflatten(-1, (2, -1)).sum((0, 1)).t().tanh()", "{v}.shape[1]",
)  # fmt: skip
WHOLE = (
    "{v}.transpose(-1, -2)", "{v}.detach()", "{v} * 2", "{v}[..., :2]", "{v}.flatten(0, -2).t()",
    "{v}.sum(-1, keepdim=True).expand_as({v})", "{v} + 0", "{v}.float()", "{v}.contiguous()", "{v}.view(-1)",
    "{v}.t().contiguous()",
)  # fmt: skip


def generate(seed: int, small: bool = False) -> Program | None:
    """The program of a seed; None if eager mode itself does not run what was drawn. A small one has one block."""
    g = Drawer(seed, small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        x = stream(g)
        own = random.Random(f"input {seed}")
        if own.random() < 0.05:
            g.add(own.choice(INPUT_WRITES).format(x=x), "write to an input")
        values = [x]
        for _ in range(1 if small else g.choice((1, 1, 1, 2, 2, 3))):
            _block(g, values, small)
        _extras(g)
        _written_behind(g, random.Random(f"behind {seed}"))
        program = _finished(g, seed)
        return program if program and runs_eagerly(program) else None


def _block(g: Drawer, values: list[str], small: bool) -> None:
    x = g.choice(values[-2:])
    if g.chance(0.1):
        embedded = _embedded(g, x)
        x = embedded or x
    kind = g.random.random()
    if kind < 0.45:
        return head(g, x)
    if g.token_dims(x) and kind < (0.47 if small else 0.55):
        return twins(g, x)
    if kind > (0.94 if small else 0.92):
        y = experts(g, x)
        if y:
            g.kept.append(y)
        return None
    if g.chance(0.3):
        x = normed(g, x)
    y = _mlp(g, x, small)
    if y and len(g.shape(y)) > 1 and g.token_dims(y):
        values.append(y)
        if g.chance(0.06):  # an MLP that nobody reads, unless its result is
            g.kept.remove(y) if y in g.kept else None
            values.pop()
    return None


def _mlp(g: Drawer, x: str, small: bool) -> str | None:
    if g.chance(0.03):
        D = g.shape(x)[-1]
        y = g.let(f"Block.apply({x}, {g.plain_weight(D, g.F)}, {g.plain_weight(g.F, D)})", "own gradients")
        g.kept += [y] if y else []
        return y
    h = widened(g, x)
    h = h and wide_steps(g, h, (0, 0, 0, 1, 1) if small else (0, 0, 1, 1, 2, 3))
    return narrowed(g, h, x) if h else None


def _embedded(g: Drawer, x: str) -> str | None:
    if g.chance(0.3):
        return g.let(g.choice(("Scaled.apply({}, 0.5)", "Clipped.apply({}, 0.1)")).format(x), "own gradients")
    D = g.shape(x)[-1]
    ids = g.given("i", "indices(11, T)")
    table = g.weight(11, D)
    if g.token_dims(x) != [len(g.shape(x)) - 2]:
        return None
    return g.let(f"{x} + F.embedding({ids}, {table})", "embedding")


def _extras(g: Drawer) -> None:
    """More users of what was made, and intermediates that are returned."""
    for _ in range(g.choice((0, 0, 0, 0, 0, 0, 1) if g.small else (0, 0, 0, 0, 1, 1, 2))):
        tensors = g.tensors()
        if tensors:
            made = g.let(g.choice(REDUCED if g.chance(0.75) else WHOLE).format(v=g.choice(tensors)), "another user")
            if made:
                g.kept.append(made)
    if g.chance(0.04) and g.tensors():
        g.kept.append(g.choice(g.tensors()))


def _written_behind(g: Drawer, own: random.Random) -> None:
    """A result that is read and then written, or written into memory of its own; a weight that is written late."""
    weights = [given.name for given in g.inputs if given.kind == "weight" and not given.view]
    if own.random() < 0.1 and g.kept:
        y = own.choice(g.kept)
        made = g.let(own.choice(READ_FIRST).format(y=y), "read first")
        g.kept += [made] if made else []
        g.add(own.choice(WRITTEN_BEHIND).format(y=y), "written behind")
    if own.random() < 0.04 and weights:
        g.add(own.choice(DATA_BEHIND).format(w=own.choice(weights)), "written behind")
    if own.random() < 0.06 and g.kept:
        y, name = own.choice(g.kept), g.name()
        if g.add(own.choice(WRITTEN_INTO).format(y=y, v=name), "written into"):
            g.kept[g.kept.index(y)] = name


def _finished(g: Drawer, seed: int) -> Program | None:
    last = [n for n in g.tensors() if g.runs[0][n].requires_grad]
    outputs = list(dict.fromkeys(g.kept)) or last[-1:]
    if g.chance(0.1) and len(outputs) > 1:
        outputs.pop(g.random.randrange(len(outputs)))
    if not any(isinstance(g.runs[0].get(n), torch.Tensor) and g.runs[0][n].requires_grad for n in outputs):
        outputs += last[-1:]
    if not outputs:
        return None
    options: dict[str, Any] = g.choice(
        ({"num_chunks": 2}, {"num_chunks": 3}, {"num_chunks": 3}, {"chunk_tokens": 4}, {"chunk_tokens": 1})
    )
    if g.chance(0.05):
        options = {"memory_budget": "1MiB"}
    if g.chance(0.05):
        options = {**options, "accumulate": "native"}
    if random.Random(f"verify {seed}").random() < 0.1:
        options = {**options, "verify": True}
    return Program(
        seed=seed,
        inputs=tuple(g.inputs),
        steps=tuple(g.steps),
        outputs=tuple(outputs),
        lengths=g.lengths,
        dynamic=g.dynamic,
        module=g.chance(0.25),
        options=options,
        backward=g.choice(("all", "all", "all", "all", "first", "last", "each", "twice")),
        cotangent=g.choice(("random", "random", "random", "expanded", "transposed", "zero")),
    )


def runs_eagerly(program: Program) -> bool:
    """Whether eager mode runs it forward and backward at every length, with gradients and numbers worth comparing."""
    try:
        for found in eager_results(program):
            gradients = [x for name, x in found.items() if name.startswith("gradient")]
            if all(x is None for x in gradients):
                return False
            if any(
                isinstance(x, torch.Tensor) and x.is_floating_point() and not x.nan_to_num(0).abs().max() < 1e5
                for x in found.values()
                if isinstance(x, torch.Tensor) and x.numel()
            ):
                return False
    except Exception:
        return False
    return True


def eager_results(program: Program) -> list[dict[str, Any]]:
    space = loaded(program)
    fn = harness.made(space["program"])
    return [
        harness.results(fn, space["inputs"], call, program.backward, program.cotangent)
        for call in range(len(program.lengths))
    ]


def loaded(program: Program) -> dict[str, Any]:
    """What the program's text defines; its lines can be found by tracebacks and reports."""
    import linecache

    text, path = program.text(), f"<program {program.seed}>"
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    space = {**vars(harness), "__name__": "fuzzed"}
    exec(compile(text, path, "exec"), space)
    return space


def simpler(program: Program, **changes: Any) -> Program | None:
    """A changed program, if eager mode still runs it."""
    changed = replace(program, **changes)
    try:
        changed = replace(changed, inputs=changed.used)
        return changed if runs_eagerly(changed) else None
    except Exception:
        return None
