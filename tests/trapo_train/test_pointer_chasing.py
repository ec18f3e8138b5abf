"""The demo task: an exact verifier, disjoint splits, traces that follow the map, and a lossless tokenizer."""

import subprocess
import sys
from collections import Counter

import pytest

from trapo_train.tasks import PointerChasingConfig, build_tokenizer, generate_rows, pointer_chasing_reward


def parse(prompt):
    listing, question = prompt.split("?")
    return dict(pair for pair in listing.split(",")), question[0], int(question[1:-1])


def map_of(prompt):
    return frozenset(parse(prompt)[0].items())


def reward(completion, solution):
    return pointer_chasing_reward(prompts=[""], completions=[completion], solution=[solution], depth=[1])[0]


def test_solution_and_trace_follow_the_map():
    for row in generate_rows(PointerChasingConfig(), num_problems=200):
        successor, node, depth = parse(row["prompt"])
        steps = []
        for _ in range(depth):
            steps.append(node + successor[node])
            node = successor[node]
        assert depth == row["depth"]
        assert row["solution"] == steps[-1]
        assert row["expert"] == "|".join(steps) + "#" + steps[-1] + "$"
        assert reward(row["expert"], row["solution"]) == 1.0


@pytest.mark.parametrize("num_nodes", [8, 9, 12])
def test_every_map_is_one_cycle_and_no_walk_visits_a_node_twice(num_nodes):
    for row in generate_rows(PointerChasingConfig(num_nodes=num_nodes, depths=(7,)), num_problems=50):
        successor, start, _ = parse(row["prompt"])
        node, visited = start, []
        for _ in range(num_nodes):
            visited.append(node)
            node = successor[node]
        assert node == start
        assert len(set(visited)) == num_nodes


def test_train_and_test_share_no_map():
    # 8 nodes have 5040 maps, so 4000 problems per split would collide if the splits were only drawn at random.
    config = PointerChasingConfig(num_nodes=8, depths=(1,))
    train = {map_of(row["prompt"]) for row in generate_rows(config, num_problems=4000, split="train", seed=0)}
    for seed in (0, 1):
        rows = generate_rows(config, num_problems=1000, split="test", seed=seed)
        held_out = {map_of(row["prompt"]) for row in rows}
        assert len(held_out) > 300
        assert not train & held_out


def test_rows_depend_on_the_seed_only():
    config = PointerChasingConfig()
    rows = generate_rows(config, num_problems=20, seed=3)
    assert rows == generate_rows(config, num_problems=20, seed=3)
    assert rows[:5] == generate_rows(config, num_problems=5, seed=3)
    assert rows != generate_rows(config, num_problems=20, seed=4)
    code = "from trapo_train.tasks import *; print(generate_rows(PointerChasingConfig(), num_problems=20, seed=3)[-1]['prompt'])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == rows[-1]["prompt"]


def test_noise_replaces_pointers_and_the_walk_goes_on_from_there():
    clean = generate_rows(PointerChasingConfig(), num_problems=1000)
    noisy = generate_rows(PointerChasingConfig(expert_noise=0.3), num_problems=1000)
    wrong = total = 0
    for before, after in zip(clean, noisy, strict=True):
        assert {**after, "expert": None} == {**before, "expert": None}
        successor, node, _ = parse(after["prompt"])
        walk, answer = after["expert"].removesuffix("$").split("#")
        for step in walk.split("|"):
            assert step[0] == node
            wrong += successor[node] != step[1]
            total += 1
            node = step[1]
        assert answer == walk[-2:]
    # One random pointer in nine happens to be right.
    assert wrong / total == pytest.approx(0.3 * 8 / 9, abs=0.03)


def test_depths_are_drawn_uniformly_from_the_list():
    rows = generate_rows(PointerChasingConfig(depths=(2, 5, 8)), num_problems=3000)
    counts = Counter(row["depth"] for row in rows)
    assert set(counts) == {2, 5, 8}
    assert min(counts.values()) > 900


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("ac|cb|bd#bd$", 1.0),
        ("ac|cb|bd#bd", 1.0),
        ("#bd$garbage", 1.0),
        ("ac|cb|bd#bc$", 0.0),
        ("ac|cb|bd#b$", 0.0),
        ("ac|cb|bd#bdd$", 0.0),
        ("ac#bc#bd$", 0.0),
        ("ac|cb|bd", 0.0),
        ("ac|cb|bd# bd$", 0.0),
        ("", 0.0),
    ],
)
def test_verifier(completion, expected):
    assert reward(completion, "bd") == expected


def test_a_random_answer_is_right_less_than_twice_in_a_hundred():
    config = PointerChasingConfig(num_nodes=8, depths=(5,))
    rows = generate_rows(config, num_problems=3000)
    guesses = ["#ab$"] * len(rows)
    scores = pointer_chasing_reward([r["prompt"] for r in rows], guesses, [r["solution"] for r in rows])
    assert sum(scores) / len(scores) < 0.02


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_nodes": 7}, "num_nodes must be in [8, 12], got 7"),
        ({"num_nodes": 13}, "got 13"),
        ({"depths": ()}, "non-empty"),
        ({"depths": (0, 3)}, "[0, 3]"),
        ({"num_nodes": 8, "depths": (8,)}, "[1, 7]"),
        ({"expert_noise": 1.5}, "[0, 1], got 1.5"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError) as error:
        PointerChasingConfig(**options)
    assert words in str(error.value)


def test_bad_split_and_count():
    with pytest.raises(ValueError, match=r"\['train', 'test'\], got 'dev'"):
        generate_rows(PointerChasingConfig(), num_problems=1, split="dev")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        generate_rows(PointerChasingConfig(), num_problems=0)


def test_tokenizer_is_character_level_and_lossless(tmp_path):
    from transformers import AutoTokenizer

    built = build_tokenizer()
    built.save_pretrained(tmp_path)
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path)):
        for row in generate_rows(PointerChasingConfig(num_nodes=12, depths=(9,)), num_problems=3):
            text = row["prompt"] + row["expert"]
            encoded = tokenizer(text, return_offsets_mapping=True)
            assert encoded["offset_mapping"] == [(i, i + 1) for i in range(len(text))]
            assert tokenizer.decode(encoded["input_ids"]) == text
            assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text.removesuffix("$")
            assert encoded["input_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token == "$"
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_tokenizer_refuses_a_character_outside_the_task():
    with pytest.raises(Exception, match="UNK"):
        build_tokenizer()("z")
