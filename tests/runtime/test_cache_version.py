"""The version in the compilers' caches changes with every source that generated code depends on."""

from __future__ import annotations

from graphs import captured, rewritten, tensors

from mst_fx.runtime import cache_version
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence


def package(root, **files):
    for name, text in files.items():
        path = root / "mst_fx" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(found, root):
    return {path.relative_to(root / "mst_fx").as_posix() for path in found}


def test_sources_are_found_by_following_imports(tmp_path):
    package(
        tmp_path,
        a__start="from mst_fx.a import beside\nfrom mst_fx.b.far import thing\n",
        a__beside="import torch\n",
        b__far="def thing():\n    from mst_fx.c import late\n",
        c__late="from mst_fx.a.start import circle\n",
        c__unread="from mst_fx.a import start\n",
    )
    found = cache_version.sources("mst_fx.a.start", root=tmp_path)
    assert names(found, tmp_path) == {"a/start.py", "a/beside.py", "b/far.py", "c/late.py"}


def test_what_lowers_and_runs_a_loop_is_among_them():
    found = cache_version.sources("mst_fx.runtime.inductor_lowering", "mst_fx.runtime.mini_sequence")
    expected = {f"runtime/{name}.py" for name in ("inductor_lowering", "mini_sequence", "loop_operator", "results")}
    assert names(found, cache_version.ROOT) >= expected


def test_another_text_is_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_version, "sources", lambda *modules: sorted(tmp_path.rglob("*.py")))
    versions = set()
    for text in ("one = 1\n", "two = 2\n", "one = 1\n"):
        package(tmp_path, runtime__mini_sequence=text)
        versions.add(cache_version._version())
    assert len(versions) == 2


def test_each_loop_carries_it():
    """Inductor's cache hashes the literals of a call; AOTAutograd's, what the inner compiler tells it."""
    gm, _ = rewritten(captured(lambda x, w, v: (x @ w).relu() @ v, *tensors((2, 37, 8), (8, 32), (32, 8))))
    (call,) = (node for node in gm.graph.nodes if node.target is mini_sequence)
    spec = CallSpec(*call.args[4])
    assert spec.forward_spec[0] == spec.backward_spec[0] == cache_version.VERSION
