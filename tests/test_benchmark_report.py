"""The report: direct ratios, losses, memory beyond the gradients, README table, regressions and plots, from rows made up here."""

import itertools

import pytest

from benchmarks import plots, readme, regressions, report, summary, tables
from benchmarks.problem import Case

ENVIRONMENT = {
    "device": "a CPU",
    "threads": 2,
    "driver": None,
    "revision": "abc",
    "command": "python -m benchmarks",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
}
GPU = ENVIRONMENT | {"device": "a GPU", "driver": "1.2"}
NATIVE, TRITON = "ours (native)", "ours (triton)"


def group(case, ratios, peaks=None, environment=ENVIRONMENT, error=1e-6):
    """One case's rows: `ratios` by contender, None for one that cannot; `peaks` in MiB."""
    shared = {"case": case.key, "title": case.title, "environment": environment, "note": "", "measured_at": ""}
    rows = []
    for name, ratio in ratios.items():
        row = {"contender": name, "status": "cannot", "reason": "has no entropy."}
        if ratio is not None:
            row = {"contender": name, "status": "ok", "ratio": ratio, "ratio_p20": ratio - 0.02, "ratio_p80": ratio + 0.02}
            row |= {"median_ms": ratio * 10, "p20_ms": ratio * 9, "p80_ms": ratio * 11, "rounds": 3}
            if not name.startswith("floor"):
                row["errors"] = {"grad_weight_relative": error if name.startswith("ours") else 1e-5}
        if peaks and name in peaks:
            row["peak_mib"] = peaks[name]
        rows.append(row | shared)
    return rows


def trapo(num_rows, hidden_size=896, **more):
    return Case("trapo", "trapo", num_rows, hidden_size, 32768, "float32", **more)


RATIOS = {"floor, 3 GEMMs": 1.0, "eager": 1.5, "torch.compile": 1.04, "quack": None, NATIVE: 1.2}
GRADIENTS = tables.required_mib({"case": trapo(2048).key})
PEAKS = {"eager": GRADIENTS + 800, NATIVE: GRADIENTS + 200}
GROUPS = [group(trapo(512), RATIOS | {"ours (torch)": 1.3}), group(trapo(2048), RATIOS, PEAKS)]


def test_direct_ratios_are_said_first():
    assert summary.in_short(GROUPS) == [
        "Peers over ours (native), time: eager 1.25 ×; torch.compile 0.87 ×. Memory beyond the gradients: eager 4.00 × (one case)."
    ]


def test_where_trl_has_one_tile_its_memory_says_so():
    def said(vocab_size):
        case = Case("trapo", "trapo", 2048, 896, vocab_size, "float32")
        held = tables.required_mib({"case": case.key})
        ratios = {"floor, 3 GEMMs": 1.0, "TRL chunked logprob": 4.0, "eager": 2.0, NATIVE: 1.0}
        return summary.in_short(
            [group(case, ratios, {"TRL chunked logprob": held + 600, "eager": held + 900, NATIVE: held + 100})]
        )[0]

    note = "TRL chunked logprob 6.00 × (one case) (its tile of 32768 columns is the whole vocabulary at V=32768)."
    assert said(32768).endswith(note) and "tile" not in said(151936)


def test_every_kind_of_loss_is_said():
    bad = group(trapo(512, peaked=False), {"floor, 3 GEMMs": 1.0, "eager": 1.6, NATIVE: 1.05}, error=1e-4)
    bad.append(bad[-1] | {"contender": "ours (torch)", "status": "failed", "reason": "ValueError: no."})
    said = "\n".join(summary.losses([*GROUPS, bad]))
    named = "trapo, N=2048 D=896 V=32768, float32: torch.compile takes 0.87 × the time of ours (native), which is 1.20 × floor"
    assert f"{named} (ranges apart)." in said
    assert "ours (native) takes 1.20 × floor, the target is 1.10." in said
    beside = group(trapo(512), {"floor, 3 GEMMs": 1.0, "floor, 3 GEMMs, new gradients": 1.08, NATIVE: 1.2})
    assert "target is 1.10; the bare GEMMs with new gradients 1.08." in "\n".join(summary.losses([beside]))
    assert "ours (native) 200 MiB, eager 800: 1/4.0." in said
    assert "flat logits: ours (native) in dWeight." in said
    assert "ours (torch), failed: ValueError: no." in said


def test_nothing_lost_is_said_too_and_a_gpu_has_its_own_targets():
    good = [group(trapo(512), {"floor, 3 GEMMs": 1.0, "eager": 1.5, NATIVE: 1.0}, {"eager": GRADIENTS + 800, NATIVE: GRADIENTS})]
    assert summary.losses(good) == ["Nowhere among the measured cases."]
    large = Case("trapo", "trapo", 32768, 3584, 152064, "bfloat16")
    ratios = {"floor, 3 GEMMs": 1.0, "eager": 3.0, TRITON: 1.2, NATIVE: 1.1}
    said = "\n".join(summary.losses([group(large, ratios, environment=GPU)]))
    assert "ours (triton) takes 1.20 × floor, the target is 1.14." in said, "auto runs Triton there, whatever native takes"


def test_overlapping_ranges_are_said():
    close = group(trapo(512), {"floor, 3 GEMMs": 1.0, "eager": 1.06, NATIVE: 1.08})
    assert "(ranges overlap)" in summary.losses([close])[2]


def test_peers_are_compared_with_us_round_by_round():
    """A drift of the machine must not decide: here one round is twice as slow for all."""
    rows = group(trapo(512), {"floor, 3 GEMMs": 1.0, "eager": 1.06, "torch.compile": 1.2, NATIVE: 1.05})
    rounds = {"eager": [10.2, 20.6, 9.9], "torch.compile": [12, 24, 12], NATIVE: [10, 20, 10]}
    measured = [row | {"rounds_ms": rounds.get(row["contender"], [9, 18, 9])} for row in rows]
    assert summary.in_short([measured])[0].endswith("time: torch.compile 1.20 × (one case); eager 1.02 × (one case).")
    assert "A peer is faster" not in "\n".join(summary.losses([measured]))
    measured[1]["rounds_ms"] = [9.9, 20.6, 9.8]
    assert (
        "eager takes 0.99 × the time of ours (native), which is 1.05 × floor (in 2 of 3 rounds)." in summary.losses([measured])[2]
    )
    measured[1]["measured_at"] = "another day"  # so no rounds in common
    assert "eager 1.01 × (one case)" in summary.in_short([measured])[0]


def test_memory_beyond_the_gradients():
    lines = tables.memory(GROUPS)
    assert f"| ours (native) | {GRADIENTS + 200:.0f} | {GRADIENTS:.0f} | 200 | – | 1/4.0 |" in lines[2]
    assert pytest.approx(4 * 896 * (2048 + 32768) / 2**20) == GRADIENTS
    score = Case("scoring", "score", 2048, 896, 32768, "float32").key
    assert tables.required_mib({"case": score}) == 0


def test_the_readme_table_has_no_holes():
    text = readme.table(GROUPS)
    assert "| | N=512 D=896 V=32768 | N=2048 D=896 V=32768 | extra MiB, N=2048 |" in text
    assert "| torch.compile | 1.04 | 1.04 | – |" in text and "| **ours (native)** | 1.20 | 1.20 | 200 |" in text
    assert "| **ours (torch)**" not in text and "Measured at some of these shapes only (see the report): ours (torch)." in text
    assert "Not in the table: quack (has no entropy)." in text
    untried = text.partition("Not measured here (see the report): ")[2]
    assert (
        "Liger FLCE; Liger FLCE, fp32 dWeight; " in untried and "quack" not in untried and "ours" not in untried.partition(".")[0]
    )
    assert text.index("floor, 3 GEMMs") < text.index("torch.compile") < text.index("| **ours")
    with pytest.raises(ValueError, match="run python -m benchmarks trapo"):
        readme.table([])


def test_the_readme_labels_say_what_is_not_reused():
    extra = {"floor, 3 GEMMs, new gradients": 1.1, "ours, nothing kept (native)": 1.2}
    text = readme.table([group(trapo(512), RATIOS | extra), group(trapo(2048), RATIOS)])
    assert "see the report): ours, buffers not reused (native)." in text
    text = readme.table([group(trapo(n), RATIOS | extra) for n in (512, 2048)])
    assert "| floor, outputs not reused | 1.10 |" in text and "| **ours, buffers not reused (native)** | 1.20 |" in text
    assert "nothing kept" not in text and "new gradients" not in text


def test_who_has_no_row_is_said_to_be_not_measured():
    text = report.render(GROUPS, [])
    (line,) = (line for line in text.splitlines() if line.startswith("- No row in these results"))
    assert "Liger scaled CE, sm_90" in line and "eager" not in line and "quack" not in line


def test_the_readme_names_every_command_that_measured_its_table():
    later = [group(trapo(2048), RATIOS, PEAKS, environment=ENVIRONMENT | {"command": "python -m benchmarks --budget 3"})]
    said = readme.table([GROUPS[0], *later]).splitlines()[-1]
    assert said.endswith(f"revision {ENVIRONMENT['revision']}: `{ENVIRONMENT['command']}`, then `python -m benchmarks --budget 3`")


def test_a_step_is_compared_with_the_body_and_the_longest_context_says_where_it_ended():
    step = group(Case("step", "trapo", 512, 896, 32768, "float32", measure="step"), {"body alone": 1.0, NATIVE: 1.4})
    assert "× body alone" in tables.of_case(step)[0]
    longest = group(Case("longest", "trapo", 512, 896, 32768, "float32", measure="longest"), {"eager": 1.0, NATIVE: 1.0})
    for row in longest:
        del row["ratio"], row["median_ms"], row["errors"]
        row["longest_tokens"] = 512
    longest[0]["stopped_by"] = "the limit of 512 MiB"
    text = "\n".join(tables.of_case(longest))
    assert summary.losses([longest]) == ["Nowhere among the measured cases."]
    assert "| eager | 512 |" in text and "≥ 512, as far as was tried" in text and "- eager stopped: the limit of 512 MiB" in text


def test_a_regression_must_exceed_both_five_percent_and_the_spread():
    def moved(**changes):
        new = [[dict(row) for row in rows] for rows in GROUPS]
        row = next(row for row in new[1] if row["contender"] == NATIVE)
        row |= changes
        return regressions.compare(GROUPS, new)

    assert moved().startswith("No ratio")
    assert moved(ratio=1.24, ratio_p20=1.22, ratio_p80=1.26).startswith("No ratio"), "within 5 %"
    assert moved(ratio=1.5, ratio_p20=1.1, ratio_p80=1.6).startswith("No ratio"), "within its spread"
    assert "| 1.20 | 1.50 | +25% slower |" in moved(ratio=1.5, ratio_p20=1.4, ratio_p80=1.6)
    assert "| 1.20 | 1.00 | -17% faster |" in moved(ratio=1.0, ratio_p20=0.9, ratio_p80=1.1)
    assert "% memory" in moved(peak_mib=PEAKS[NATIVE] * 1.5)
    assert "ok → wrong" in moved(status="wrong", reason="")


def test_the_report_shows_its_plots_with_captions(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    pictures = plots.draw(GROUPS, tmp_path)
    assert [name for name, _ in pictures] == ["heads_trapo", "time_trapo", "accuracy_time"], "one length has no memory"
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name, _ in pictures)
    text = report.render(GROUPS, pictures)
    assert "![Time over the bare GEMMs" in text and "](time_trapo.png)" in text


def test_labels_at_line_ends_are_pushed_apart():
    places = plots._spread([0.5, 0.5, 0.51, 0.99, 1.0], 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(places)) and places[-1] <= 1.0
