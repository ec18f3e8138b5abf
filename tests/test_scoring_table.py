"""The table of measured scoring times: written from results, and what the package ships of it."""

import json

from benchmarks import scoring_table

GPU = "NVIDIA H200"


def _entry(shape, device=GPU, **median_ms):
    return {"device": device, "dtype": "bfloat16", "shape": list(shape), "median_ms": median_ms, "fences": True}


def _row(contender, num_rows, median_ms, job="score", gpu=True, **changes):
    case = {"job": job, "num_rows": num_rows, "hidden_size": 64, "vocab_size": 1000, "dtype": "bfloat16", "logits_dtype": "float32"}
    times = {"median_ms": median_ms} | ({"cold_median_ms": 2 * median_ms} if gpu else {})
    environment = {"device": GPU, "revision": "abc", "versions": {"triton": "3.8.0"}}
    return {"contender": contender, "case": case, "environment": environment, "status": "ok"} | times | changes


def test_the_table_is_made_from_the_scoring_results(tmp_path):
    rows = [
        _row("ours (triton)", 64, 9.9),
        _row("ours (triton)", 64, 3.0),  # the latest measurement counts
        _row("ours (triton_fused)", 64, 2.0),
        _row("ours (native_fused)", 64, 0.1, status="wrong"),
        _row("eager", 64, 0.01),
        _row("ours (triton)", 128, 3.0),  # alone
        _row("ours (triton)", 256, 3.0, job="trapo"),
        _row("ours (triton_fused)", 256, 3.0, job="trapo"),
        _row("ours (triton)", 512, 3.0, gpu=False),
        _row("ours (triton_fused)", 512, 3.0, gpu=False),
    ]
    results, table = tmp_path / "results.jsonl", tmp_path / "scoring.json"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    old = [_entry((1, 2, 3), triton=1.0, triton_fused=2.0), _entry((1, 2, 3), device="NVIDIA L4", triton=1.0, triton_fused=2.0)]
    table.write_text(json.dumps({"command": None, "entries": old}))
    assert scoring_table.main([str(results), "--table", str(table)]) == 0
    written = json.loads(table.read_text())
    expected = _entry((64, 64, 1000), triton=3.0, triton_fused=2.0) | {"revision": "abc"}
    assert written["entries"] == [expected, old[1]] and "scoring_table" in written["command"]


def test_milliseconds_of_other_conditions_are_left_out_and_said(tmp_path, capsys):
    """A run without one contender, as after a crash, leaves its older row standing."""
    then = {"device": GPU, "revision": "old", "versions": {"triton": "3.6.0"}}
    now = {"device": GPU, "revision": "new", "versions": {"triton": "3.8.0"}}
    rows = [_row(name, 64, ms, environment=then) for name, ms in (("ours (triton_fused)", 9.0), ("ours (native_fused)", 8.0))]
    rows += [_row("ours (triton)", 64, 6.0, environment=now | {"command": "a"})]
    rows += [_row("ours (native_fused)", 64, 5.0, environment=now | {"command": "b"})]
    rows += [_row("ours (triton_fused)", 128, 9.0, environment=then), _row("ours (triton)", 128, 6.0, environment=now)]
    results, table = tmp_path / "results.jsonl", tmp_path / "scoring.json"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table.write_text(json.dumps({"command": None, "entries": []}))
    assert scoring_table.main([str(results), "--table", str(table)]) == 0
    (entry,) = json.loads(table.read_text())["entries"]
    assert entry == _entry((64, 64, 1000), triton=6.0, native_fused=5.0) | {"revision": "new"}
    assert capsys.readouterr().err.count("bfloat16: triton_fused is left out") == 2


def test_results_without_a_gpu_make_no_table(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(_row("ours (triton)", 64, 1.0)) + "\n")
    assert scoring_table.main([str(results), "--table", str(tmp_path / "none.json")]) == 1
    assert "no GPU timings" in capsys.readouterr().err


def test_every_pinned_entry_was_measured():
    table = json.loads(scoring_table.TABLE.read_text())
    assert not table["entries"] or table["command"]
    for entry in table["entries"]:
        assert "triton" in entry["median_ms"] and len(entry["median_ms"]) > 1 and entry["revision"]
        assert set(entry["median_ms"]) <= set(scoring_table.CONTENDERS.values())
