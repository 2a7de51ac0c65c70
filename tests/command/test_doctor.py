"""`python -m mst_fx doctor`: what it checks, and its exit status."""

from __future__ import annotations

import pytest
import torch

import mst_fx
from mst_fx.command import doctor
from mst_fx.command.arguments import main
from mst_fx.core.torch_private import inductor


def run(capsys, *arguments: str) -> tuple[int, list[str]]:
    status = main(["doctor", "--inner", "eager", "--device", "cpu", *arguments])
    return status, capsys.readouterr().out.splitlines()


def failures(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("FAIL")]


def test_a_sound_machine(capsys):
    status, lines = run(capsys)
    assert status == 0
    assert failures(lines) == []
    text = "\n".join(lines)
    for told in (torch.__version__, mst_fx.__version__, 'the backend "mst_fx"', "device cpu", "mst_fx.engine loads"):
        assert told in text
    assert "gives the loss and the gradients of eager execution" in lines[-1]


@pytest.mark.slow
def test_a_sound_machine_with_inductor(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "Inductor has a compiler for cpu" in out
    assert "compiled with inductor on cpu gives the loss" in out


def test_a_backend_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(torch.compiler, "list_backends", lambda *_: ["inductor"])
    status, lines = run(capsys)
    assert status == 1
    assert ["does not find the backend" in line for line in failures(lines)] == [True]


def test_a_name_that_torch_lacks(capsys, monkeypatch):
    def loaded(name):
        raise ImportError("cannot import name 'Gone' from 'torch._inductor' (somewhere)", name="torch._inductor")

    monkeypatch.setattr(doctor.importlib, "import_module", loaded)
    status, lines = run(capsys)
    assert status == 1
    assert "mst_fx.engine cannot be loaded, so there are no loops" in failures(lines)[0]
    assert f"torch {torch.__version__} has no 'Gone'" in failures(lines)[0]


def test_what_is_switched_off(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setattr(inductor, "option", lambda name: name == "cpp_wrapper")
    monkeypatch.setattr(inductor, "missing_compiler", lambda device: "a C++ compiler")
    monkeypatch.setattr(inductor, "cache_folder", lambda: None)
    told = [(check.status, check.text.partition(":")[0]) for check in doctor._settings("cpu", "inductor")]
    assert told == [
        ("FAIL", "TORCH_COMPILE_DISABLE is set"),
        ("FAIL", "Inductor's C++ wrapper is on, and cannot call loops"),
        ("FAIL", "Inductor needs a C++ compiler for cpu"),
        ("note", "this version of torch does not tell where its caches are"),
    ]


def test_a_compiler_that_is_missing_is_seen():
    from torch._inductor import config, cpp_builder

    assert inductor.missing_compiler("cpu") is None
    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        assert inductor.missing_compiler("cpu") == "a C++ compiler"


def test_caches_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(inductor, "cache_folder", lambda: "/somewhere/else")
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert (doctor._caches().status, "cannot be written" in doctor._caches().text) == ("note", True)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("TOLERANCE", -1.0, "differs from eager execution by"),
        ("CHUNK", "many", "fails: "),
        ("_step", lambda *tensors: sum(x.sum() for x in tensors[:-1]), "0 of 2 regions are looped"),
    ],
)
def test_a_loop_that_goes_wrong(monkeypatch, name, value, told):
    monkeypatch.setattr(doctor, name, value)
    check = doctor._tried("eager", "cpu")
    assert check.status == "FAIL"
    assert told in check.text


def test_a_device_that_is_not_there(capsys):
    assert main(["doctor", "--inner", "eager", "--device", "nothing"]) == 1
    assert "device nothing" in failures(capsys.readouterr().out.splitlines())[0]
