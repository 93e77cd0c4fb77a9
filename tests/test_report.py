from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
from reports import BLOCKS, SHAPES, make_report
from rich.console import Console

from sparsekit.reporting.charts import place, short_names
from sparsekit.reporting.findings import headline, no_gains, paired_change
from sparsekit.reporting.numerals import change, duration, megabytes, percent, perplexity, short, significant
from sparsekit.reporting.report import html, markdown, plain, write_report
from sparsekit.reporting.tasks import main_metrics, metrics, task_table
from sparsekit.terminal.console import Terminal
from sparsekit.terminal.console import duration as console_duration

HOSTILE = '<script>alert("1")</script>|`*\' &amp;'
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What a browser would see: tags in balance, their attributes, the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


def hostile(value):
    """The same report with every name in it replaced by markup."""
    if isinstance(value, dict):
        return {key: hostile(one) for key, one in value.items()}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_writes_three_files(tmp_path):
    report = make_report()
    paths = write_report(report, tmp_path)
    names = {kind: path.name for kind, path in paths.items()}
    assert names == {"report": "report.html", "json": "report.json", "markdown": "report.md"}
    assert json.loads(paths["json"].read_text()) == report
    assert {path.name for path in tmp_path.iterdir()} == set(names.values())


def test_json_is_strict(tmp_path):
    report = make_report()
    report["final"]["valid"]["perplexity"] = math.inf
    report["steps"][0]["layers"][0]["error"] = math.nan
    paths = write_report(report, tmp_path)

    def refuse(name):
        raise AssertionError(name)

    read = json.loads(paths["json"].read_text(), parse_constant=refuse)
    assert read["final"]["valid"]["perplexity"] is None
    assert "∞" in paths["report"].read_text()
    assert ">nan<" not in paths["report"].read_text().lower()


def test_page_stands_alone():
    page = Page(html(make_report()))
    assert page.count("script") == page.count("link") == page.count("img") == 0
    for _, attributes in page.tags:
        assert not {"src", "href", "onload", "onclick"} & attributes.keys()
    style = "".join(page.text)
    assert "url(" not in style
    assert "@import" not in style


def test_page_says_what_matters():
    report = make_report()
    page = html(report)
    text = " ".join("".join(Page(page).text).replace("\u00a0", " ").split())
    for part in (
        "88.1 MB of weights in float32 became 22.6 MB of gptq files: 3.89 times smaller",
        "27.540 → 29.204 on valid (+6.0 %)",
        "0 of 4,718,592 groups break the 2:4 pattern",
        "1 of 2 quality gates failed: valid",
        "27.540 → 28.381 ± 0.324",
        "device memory allocated",
        "12 min 05 s",
        "mean of the next-token losses",
        "no smaller than dense integers of the same width, and no faster",
        "Serving speed was not measured",
        "misreads",
        "Held-out perplexity",
        "3 inputs never fire",
        "arc_easy",
        "NVIDIA H200",
        "steps: [{method: ast}",
    ):
        assert part in text, part
    assert 'title="6,442,450,944 bytes device memory allocated"' in page


def test_every_layer_is_in_the_map_and_in_the_table():
    page = html(make_report())
    for kind in SHAPES:
        for block in range(BLOCKS):
            name = f"model.layers.{block}.{kind}"
            assert page.count(f"<title >{name}: ") == 2
            assert page.count(f">{name}</th>") == 2


def test_everything_is_escaped():
    report = hostile(make_report())
    page = Page(html(report))
    assert page.count("script") == 0
    assert HOSTILE in "".join(page.text)
    assert any(HOSTILE in (value or "") for _, attributes in page.tags for value in attributes.values())
    written = markdown(report)
    assert "<script" not in written
    rows = [line for line in written.splitlines() if line.startswith("| 1")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 10 for row in rows)  # no name adds a column


def test_backticks_are_code_on_the_page():
    report = make_report()
    report["steps"][1]["source"] = "Alg. 1; `act_order` from <b>IST-DASLab</b>"
    page = html(report)
    assert "<code>act_order</code> from &lt;b&gt;" in page
    assert "`act_order`" in markdown({**report, "notes": [report["steps"][1]["source"]]}).replace("\\", "")


def test_markdown_holds_the_same_numbers():
    written = markdown(make_report())
    assert written.startswith("# ast-gptq4-base\n")
    assert "27.540 → 28.381 ± 0.324" in written
    assert "Serving speed was not measured" in written
    assert plain("a|b\n<c>") == "a\\|b &lt;c>"


def test_a_bare_report_is_a_report():
    report = make_report()
    report |= {"dense": {}, "final": {}, "exports": [], "gates": [], "tasks": {}}
    for step in report["steps"]:
        step |= {"before": {}, "perplexity": {}, "layers": [], "groups": 0, "pattern": None}
        for key in ("curve", "training", "seconds", "peak_memory", "peak_memory_of"):
            step.pop(key, None)
    page = "".join(Page(html(report)).text).replace("\u00a0", " ")
    assert "22.0 M parameters, nothing was exported; no perplexity was measured; no N:M pattern to hold." in page
    assert "Training loss" not in page
    assert markdown(report)
    report["steps"] = []
    assert html(report)


def test_no_gain_is_said_and_no_gain_is_not_invented():
    report = make_report()
    del report["exports"][1]
    assert "no smaller than the original" in headline(report)
    assert any("stores every zero" in line for line in no_gains(report))
    for step in report["steps"]:
        step |= {"pattern": None, "sparsity": 0.0, "kind": "quantize"}
    assert not any("zero" in line for line in no_gains(report))


def test_basis_is_the_precision_of_the_original():
    report = make_report()
    report["environment"]["dtype"] = "bfloat16"
    sentence = headline(report).replace("\u00a0", " ")
    assert "44.1 MB of weights in bfloat16" in sentence
    assert "1.95 times smaller" in sentence
    assert "3.89" not in sentence


def test_paired_change_leaves_out_how_hard_windows_are():
    dense = {"perplexity": math.exp(2.0), "window_losses": [1.0, 2.0, 3.0]}
    rise, spread = paired_change(dense, {"perplexity": math.exp(2.1), "window_losses": [1.1, 2.1, 3.1]})
    assert rise == pytest.approx(math.exp(0.1) - 1)
    assert spread == pytest.approx(0.0, abs=1e-12)
    differences = [0.0, 0.1, 0.2]
    after = {"perplexity": math.exp(2.1), "window_losses": [1.0, 2.1, 3.2]}
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((one - mean) ** 2 for one in differences) / 2)
    assert paired_change(dense, after)[1] == pytest.approx(math.exp(0.1) * deviation / math.sqrt(3))
    assert paired_change(dense, {"perplexity": 9.0})[1] is None


def test_experts_share_a_place():
    assert place("model.layers.3.self_attn.q_proj") == ("self_attn.q_proj", 3)
    assert place("model.layers.11.mlp.experts.7.up_proj") == ("mlp.experts.*.up_proj", 11)
    assert place("lm_head") is None
    assert short_names(["self_attn.q_proj", "mlp.up_proj"]) == ["q_proj", "up_proj"]
    assert short_names(["mlp.up_proj", "mlp.experts.*.up_proj"]) == ["mlp.up_proj", "mlp.experts.*.up_proj"]


def test_tasks_of_a_run_are_tested_document_by_document():
    def scored(*correct: int) -> dict:
        return {"piqa": {"acc": sum(correct) / 8, "documents": {"n": 8, "truncated": 0, "correct": {"acc": correct}}}}

    tasks = {"dense": scored(*[1] * 8), "final": scored(*[1] * 2, *[0] * 6)}
    ((task, metric, before, after, p),) = task_table(tasks).rows
    assert [cell.text for cell in (task, metric, before, after)] == ["piqa", "acc", "1.0000", "0.2500"]
    assert p.text == "0.031"  # six lost, none won: 2 / 2^6
    assert "6 documents lost" in p.title
    assert "arc_easy" in html(make_report())
    with (console := Console(width=100)).capture() as capture:
        Terminal(console).closed({**make_report(), "tasks": tasks}, {})
    assert "piqa" in capture.get()


def test_a_task_with_a_perplexity_is_judged_by_its_accuracy():
    scores = {"lambada": {"perplexity": 142185.5, "perplexity_stderr": 217326.4, "acc": 0.25, "acc_stderr": 0.1}}
    assert main_metrics(scores) == [("lambada", "acc")]
    rows = [[cell.text for cell in row] for row in task_table({"dense": scores}).rows]
    assert rows == [
        ["lambada", "perplexity", "142,185.50 ± 217,326.40", "–", "–"],
        ["lambada", "acc", "0.2500 ± 0.1000", "–", "–"],
    ]


def test_metrics_of_lm_eval():
    found = dict(metrics({"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.2}, "b": 0.25}))
    assert found == {("a", "acc"): (0.5, 0.1), ("a", "f1 (strict)"): (0.2, None), ("b", "score"): (0.25, None)}
    assert dict(metrics({"a": {"acc,none": 0.5, "acc_stderr,none": "N/A"}})) == {("a", "acc"): (0.5, None)}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (duration(48.04), "48.0 s"),
        (duration(725.2), "12 min 05 s"),
        (duration(5999.4), "99 min 59 s"),
        (duration(7199.0), "2 h 00 min"),
        (megabytes(5_312_345), "5.3 MB"),
        (megabytes(73_700), "73.7 KB"),
        (megabytes(12), "12 bytes"),
        (megabytes(0), "0.0 MB"),
        (perplexity(27.54), "27.540"),
        (perplexity(1234.5), "1,234.50"),
        (perplexity(math.inf), "∞"),
        (perplexity(None), "–"),
        (percent(0.123), "12.3 %"),
        (change(-0.031), "−3.1 %"),
        (change(0.004), "+0.40 %"),
        (change(122.0), "× 123"),
        (change(math.nan), "not a number"),
        (short(262_144), "262 K"),
        (short(4_000_000), "4.00 M"),
        (short(999_999), "1.00 M"),
        (short(12), "12"),
        (significant(0.012345), "0.0123"),
        (significant(4.56e-7), "4.56e-07"),
        (significant(0), "0"),
        (significant(999.9), "1,000"),
    ],
)
def test_numbers_as_they_are_written(written, expected):
    assert written.replace("\u00a0", " ") == expected


def test_terminal_and_report_write_times_alike():
    assert console_duration is duration


def test_agreement_is_shown_when_it_was_measured():
    report = make_report()
    assert "KL to dense" not in html(report)
    figures = {"kl": 0.1234, "kl_stderr": 0.01, "top1": 0.812, "top1_stderr": 0.003, "tokens": 99}
    report["final"]["valid"]["agreement"] = figures
    page, text = html(report), markdown(report)
    assert "KL to dense" in page
    assert ">0.123<" in page
    assert "81.2\u00a0%" in page
    assert "0.123" in text
