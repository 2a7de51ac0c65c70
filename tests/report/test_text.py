"""The text of a report: what is alike once, within the columns of a terminal; what to change first."""

from __future__ import annotations

from dataclasses import replace

from expecttest import TestCase
from sample_reports import FULL, LINE, MIB, mlp, refusal, value

from mst_fx.core.readable import readable
from mst_fx.report.alike import alike
from mst_fx.report.items import RefusedRegion
from mst_fx.report.lines import WIDTH, prose, short, source_clipped
from mst_fx.report.report import Report


class TextTest(TestCase):
    def test_text(self):
        self.assertExpectedInline(
            str(FULL),
            """\
mst_fx: 5 looped, 3 left alone, 2 graphs
peak of a step (largest of 2 graphs): 14.0 MiB -> 7.0 MiB (predicted, without and with loops)
  alive then: backward of mlp at model -> forward of attention
     9.0 MiB ->        0 B  saved for backward: 4 x mlp at model.layers.*.mlp
     5.0 MiB ->    5.0 MiB  parameters
         0 B ->    2.0 MiB  working memory: scaled_dot_product_attention at model.layers.3.self_attn
memory_budget kept: 8.0 MiB allowed
change first: 3.0 MiB of returned logits at model.layers.4.mlp.down: returned_logits='drop' does
    without them in training
4 x gated_mlp at model.layers.*.mlp.down: 8 chunks of dim 1 (64 positions)
    .../model/modeling.py:164: return self.down(self.act(self.gate(x)) * self.up(x))
    36.0 MiB -> 4.0 MiB of temporaries, backward recompute, +0.0 ms a step each (predicted)
gated_mlp at model.layers.4.mlp.down: 2 chunks of dim 1 (64 positions)
    .../model/modeling.py:164: return self.down(self.act(self.gate(x)) * self.up(x))
    36.0 MiB -> 4.0 MiB of temporaries, backward recompute, +0.0 ms a step (predicted)
    Returned logits have to exist: 3.0 MiB; returned_logits='drop' does without them in training.
    Verified at its own sizes.
cut before the head at lm_head: 4.0 MiB -> 1.0 MiB of logits
    .../model/modeling.py:164: return self.down(self.act(self.gate(x)) * self.up(x))
nothing is returned for 1.0 MiB at lm_head
    .../model/modeling.py:164: return self.down(self.act(self.gate(x)) * self.up(x))
2 x mlp at model.layers.*.mlp left alone (ESCAPES): the value of the gate is returned
    .../model/modeling.py:164: return self.down(self.act(self.gate(x)) * self.up(x))
    Keep it inside.
mlp at model.layers.3.mlp left alone (ESCAPES): another
    .../model/modeling.py:164: return self.down(self.act(self.gate(x)) * self.up(x))
not looped, the largest first:
2.0 MiB saved, torch.tanh [4, 4] float32 at model.norm: why
    .../model/modeling.py:164: return self.down(self.act(self.gate(x)) * self.up(x))
    Add a pattern.
1.0 MiB in 1 kind of values that no loop makes smaller (report.unlooped)
a note""",
        )

    def test_a_missed_budget_is_one_line(self):
        missed = RefusedRegion("all", "BUDGET", "", "", "2.0 MiB more", "5.0 MiB allowed, the least is 7.0 MiB", "")
        report = Report(refusals=(missed,), peak=7 * MIB, peak_whole=7 * MIB, budget=5 * MIB)
        self.assertExpectedInline(
            str(report),
            """\
mst_fx: 0 looped, 0 left alone, 1 graph
peak of a step: 7.0 MiB (predicted)
memory_budget missed: 5.0 MiB allowed, the least is 7.0 MiB
change first: 2.0 MiB more""",
        )


def test_lines_fit_a_terminal():
    assert max(map(len, str(FULL).splitlines())) <= WIDTH
    assert all(line.strip() for line in str(FULL).splitlines())


def test_data_stay_one_entry_each():
    assert len(FULL.regions) == 5
    assert [(entry.module, len(group)) for entry, group in alike(FULL.regions)] == [
        ("model.layers.*.mlp.down", 4),
        ("model.layers.4.mlp.down", 1),
    ]


def test_only_numbers_that_differ_are_stars():
    ((entry, group),) = alike([refusal(1, module=f"blocks.{n}.experts.2.mlp") for n in (10, 11)])
    assert (entry.module, len(group)) == ("blocks.*.experts.2.mlp", 2)


def test_source_lines_keep_the_file_and_the_number():
    assert source_clipped(LINE, 60) == ".../model/modeling.py:164: return self.down(self.act(self..."
    assert source_clipped("file.py:1: x", 60) == "file.py:1: x"
    assert source_clipped("", 60) == ""


def test_long_words_are_not_broken():
    word = "a" * 120
    assert prose(f"see {word}") == ["see", f"    {word}"]


def test_a_number_and_its_unit_stay_together():
    for length in range(80, 100):
        assert not any(line.endswith(" 3.0") for line in prose(f"{'a' * length} 3.0 MiB of it"))


def test_ops_are_told_without_the_modules_of_torch():
    names = {"torch.nn.functional.linear": "linear", "operator.add": "add", "torch.cat": "cat", "aten.mm.default": "mm"}
    assert {name: short(name) for name in names} == names
    assert short("library.Rounded.apply") == "library.Rounded.apply"
    assert short("aten.add.Tensor") == "aten.add.Tensor"


def test_one_unit_style():
    assert [readable(size) for size in (0, 1023, 1024, 1536 * 2**10, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "3.00 GiB",
    ]


def test_what_has_most_bytes_is_to_be_changed_first():
    assert Report().change_first == ""
    assert Report(unlooped=(value(2 * MIB), value(3 * MIB))).change_first.startswith(
        "3.0 MiB of torch.tanh at model.norm: "
    )
    two = value(2 * MIB), value(2 * MIB, "NO_GAIN"), value(2 * MIB, "NO_GAIN")
    assert Report(unlooped=two).change_first.startswith("activation checkpointing: 4.0 MiB ")
    returned = mlp(0, returned_bytes=3 * MIB, returned_gradient_bytes=3 * MIB)
    assert "returned_logits='drop'" in Report(regions=(returned,), unlooped=two).change_first
    assert "returned_logits" not in Report(regions=(mlp(0),)).change_first


def test_a_missed_budget_and_refusals_come_first_and_last():
    missed = refusal(0, "BUDGET", advice="2.0 MiB more")
    assert Report(refusals=(refusal(1), missed), unlooped=(value(MIB),)).change_first == "2.0 MiB more"
    assert Report(refusals=(refusal(1),)).change_first == "mlp at model.layers.1.mlp: Keep it inside."
    assert Report(refusals=(refusal(1, "SMALL"),)).change_first == ""


def test_advice_that_stands_just_above_is_not_told_again():
    assert str(FULL).count("Keep it inside.") == 1
    apart = replace(FULL, refusals=(refusal(0), refusal(1, advice="Other."), refusal(2, text="third")))
    assert str(apart).count("Keep it inside.") == 2
