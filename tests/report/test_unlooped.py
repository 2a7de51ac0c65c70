"""Entries of large values that no loop covers: together, joined, in words."""

from __future__ import annotations

from mst_fx.report.report import Report
from mst_fx.report.unlooped import Unlooped, joined, text_of, together


def entry(module="layers.0", size=1024, why="why", **others):
    known = {"op": "op", "source": "file:1: op()", "shape": (16, 16), "dtype": "float32", "count": 1, "saved": True}
    known |= {"reason": "NO_PATTERN", "advice": "advice", **others}
    return Unlooped(module=module, bytes=size, why=why, **known)


def test_what_is_alike_but_for_the_number_of_its_module_is_counted_together():
    (found,) = together([entry("layers.0.a"), entry("layers.11.a")])
    assert (found.module, found.count, found.bytes, found.total) == ("layers.*.a", 2, 1024, 2048)
    assert len(together([entry(), entry(why="another")])) == 2


def test_the_largest_together_comes_first():
    alone, two, unsaved = entry(size=3000), entry("b", size=2000, count=2), entry("c", size=2500, count=9, saved=False)
    assert together([alone, unsaved, two]) == [two, alone, unsaved]


def test_reports_of_several_graphs_have_ten_at_most():
    one, other = (tuple(entry(f"m{n}", size=n) for n in numbers) for numbers in (range(1, 9), range(9, 17)))
    found = (Report(unlooped=one) + Report(unlooped=other)).unlooped
    assert [value.bytes for value in found] == [*range(16, 6, -1)]


def test_what_is_large_in_a_small_graph_is_not_told_beside_a_large_one():
    small, large = Report(unlooped=(entry(size=100),), peak=1000), Report(peak=5001)
    assert not (small + large).unlooped
    assert (small + Report(peak=5000)).unlooped


def test_a_value_that_another_graph_makes_is_told_there():
    made, read = entry("maker"), entry("reader", enters=True)
    assert joined((made,), (read,)) == (made,)
    assert joined((), (read,)) == (read,)
    assert len(joined((made,), (entry("reader", enters=True, shape=(2, 2)),))) == 2


def test_words():
    text = text_of((entry(), entry("b", saved=False, count=3), entry("c", why="another")))
    assert text == [
        "not looped, the largest first:",
        "1.0 KiB saved, op [16, 16] float32 at layers.0: why",
        "    file:1: op()",
        "    advice",
        "3 x 1.0 KiB, op [16, 16] float32 at b: why",
        "    file:1: op()",
        "1.0 KiB saved, op [16, 16] float32 at c: another",
        "    file:1: op()",
        "    advice",
    ]
    assert text_of(()) == []


def test_values_that_no_loop_makes_smaller_are_told_in_one_line():
    small = entry(reason="NO_GAIN", count=2), entry("b", reason="NO_GAIN", saved=False)
    line = "3.0 KiB in 2 kinds of values that no loop makes smaller (report.unlooped)"
    assert text_of(small) == [f"not looped: {line}"]
    assert text_of((*small, entry("c")))[-1] == line
