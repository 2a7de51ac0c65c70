"""`python -m mst_fx explain`: what it takes, prints and exits with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mst_fx
from mst_fx.command.arguments import main

PROGRAM = """
import torch
import torch.nn.functional as F

torch.manual_seed(0)
head = torch.randn(512, 16, requires_grad=True)
calls = []

def loss(x, labels=None):
    return F.cross_entropy(F.linear(x, head), labels)

def batch():
    return torch.randn(64, 16), torch.randint(512, (64,))

def made():
    print("printed by the program")
    x, labels = batch()
    return loss, (x,), {"labels": labels}

def pair():
    return loss, list(batch())

def step():
    calls.append(torch.compiler.is_compiling())
    return loss(*batch())

def fails():
    raise ValueError("no data\\nhere")

def takes(x):
    return x

def odd():
    return loss, 3

def alone():
    return loss

class Steps:
    @staticmethod
    def inside():
        return loss(*batch())

number = 3
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    torch._dynamo.reset()
    (tmp_path / "some_program.py").write_text(PROGRAM)
    (tmp_path / "broken_program.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("some_program", "broken_program"):
        sys.modules.pop(name, None)


def run(*arguments: str) -> int:
    return main(["explain", *arguments])


@pytest.mark.parametrize("name", ["made", "pair", "step", "Steps.inside"])
@pytest.mark.parametrize("module", ["some_program", "some_program.py"])
def test_what_a_function_returns_or_runs_is_told(capsys, module, name):
    assert run(f"{module}:{name}", "--option", "min_bytes=0") == 0
    out, err = capsys.readouterr()
    assert out.startswith("mst_fx: 1 looped, 0 left alone, 1 graph\n")
    assert ("printed by the program" in err) == (name == "made")


def test_a_step_is_called_without_compiling_but_with_the_option_it_is_not():
    assert run("some_program:step") == 0
    calls = sys.modules["some_program"].calls
    assert len(calls) == 2
    assert calls[0] is False
    torch._dynamo.reset()
    calls.clear()
    assert run("some_program:step", "--step") == 0
    assert len(calls) == 1


def test_options_are_literals_or_strings(capsys):
    options = ("min_bytes=0", "num_chunks=4", "modules={'nothing': False}", "returned_logits=detach")
    assert run("some_program:pair", "--json", *(text for option in options for text in ("--option", option))) == 0
    told = json.loads(capsys.readouterr().out)
    assert [region["chunks"] for region in told["regions"]] == [4]
    assert told["notes"] == ["modules: 'nothing' matches no module of this graph"]
    assert told["format"] == 1


def test_a_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert run("some_program:pair", "--plot", "memory.png") == 0
    assert (tmp_path / "memory.png").exists()
    assert run("some_program:pair", "--plot", "no/folder/memory.png") == 1
    out, err = capsys.readouterr()
    assert out.count("mst_fx: ") == 2  # the report is told all the same
    assert "No such file" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["some_program"], "'some_program' is not package.module:function"),
        (["no_such_program:step"], "there is no module no_such_program"),
        (["some_program.inner:step"], "there is no module some_program.inner"),
        (["no_such_program.py:step"], "there is no file no_such_program.py"),
        (["broken_program:step"], "broken_program fails when it is imported: ModuleNotFoundError: No module named"),
        (["some_program:nothing"], "some_program has no function 'nothing'"),
        (["some_program:number"], "some_program:number is no function, but of type int"),
        (["some_program:takes"], "some_program:takes has to take no arguments, but: missing a required argument: 'x'"),
        (["some_program:fails"], "some_program:fails fails (it ran uncompiled; --step leaves that out): ValueError"),
        (["some_program:alone"], "some_program:alone returns a function alone: return (function, arguments)"),
        (["some_program:odd"], "some_program:odd returns a function with something else than"),
        (["some_program:pair", "--option", "chunks=3"], "unknown option 'chunks'"),
        (["some_program:pair", "--option", "min_bytes=much"], "option 'min_bytes' takes an int"),
        (["some_program:pair", "--option", "disable=no_pattern"], "no pattern is called ['no_pattern']"),
    ],
)
def test_errors_name_what_is_wrong(capsys, arguments, told):
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.rstrip().splitlines()[-1].startswith("mst_fx: ")
    assert told in err.rstrip().splitlines()[-1]


@pytest.mark.parametrize("arguments", [[], ["explain"], ["explain", "a:b", "--option", "x"], ["doctor", "--no"]])
def test_wrong_arguments_exit_with_two(arguments):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2


def test_as_a_command_with_each_decision_logged(tmp_path):
    """`python -m mst_fx`, under TORCH_LOGS."""
    command = [sys.executable, "-m", "mst_fx", "explain", "some_program:pair", "--option", "min_bytes=0"]
    path = os.pathsep.join([str(Path(mst_fx.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TORCH_LOGS": "+mst_fx", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mst_fx: 1 looped, 0 left alone, 1 graph\n")
    told = [done.stderr.find(f"mst_fx: {step}: ") for step in ("found", "bodies", "plan", "spliced")]
    assert told == sorted(told)
    assert told[0] >= 0
    failed = subprocess.run([*command[:4], "some_program:fails"], cwd=tmp_path, env=environment, capture_output=True)
    assert failed.returncode == 1
