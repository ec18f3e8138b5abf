"""Pointer chasing: follow a shuffled map from a start for a given number of steps.

    prompt   ac,bd,cb,da?a3:     a → c, b → d, c → b, d → a; start at a, take 3 steps
    expert   ac|cb|bd#bd$        one step per paragraph (`|`), then `#`, the answer, and `$` as end of sequence
    answer   bd                  the last two nodes visited

Every map is one cycle through all nodes and a walk is shorter than the cycle, so no node is visited twice and the
answer cannot be read off the start. Two random nodes are the answer once in num_nodes², below 2 % from 8 nodes on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trapo_train.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NODE_NAMES = "abcdefghijkl"
PARAGRAPH_BREAK = "|"
ANSWER_MARK = "#"
EOS_TOKEN = "$"
PAD_TOKEN = "<pad>"
MIN_NODES = 8
MAX_DEPTH = 9  # the prompt spells the depth with one digit
SPLITS = ("train", "test")
TEST_SHARE = 10  # one map in TEST_SHARE is held out


@dataclass(frozen=True)
class PointerChasingConfig:
    """What kind of pointer-chasing problems to generate."""

    num_nodes: int = 9
    """Nodes in each map, 8 to 12; more make the map longer and a random answer rarer."""
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Walk lengths in steps, each 1 to 9 and below num_nodes; every problem draws one uniformly."""
    expert_noise: float = 0.0
    """Probability in [0, 1] that a pointer of the expert trace is replaced by a random node, where the walk goes on."""

    def __post_init__(self) -> None:
        if not MIN_NODES <= self.num_nodes <= len(NODE_NAMES):
            raise UserError(
                f"num_nodes must be in [{MIN_NODES}, {len(NODE_NAMES)}], got {self.num_nodes}. "
                f"Fewer nodes make a random answer right too often; node names end at {NODE_NAMES[-1]!r}."
            )
        deepest = min(MAX_DEPTH, self.num_nodes - 1)
        if not self.depths or any(not 1 <= depth <= deepest for depth in self.depths):
            raise UserError(
                f"depths must be a non-empty list of steps in [1, {deepest}], got {list(self.depths)}. "
                f"A walk must be shorter than the cycle of num_nodes = {self.num_nodes} nodes."
            )
        if not 0.0 <= self.expert_noise <= 1.0:
            raise UserError(f"expert_noise must be a probability in [0, 1], got {self.expert_noise}.")


def generate_rows(config: PointerChasingConfig, *, num_problems: int, split: str = "train", seed: int = 0) -> list[dict[str, Any]]:
    """Generate `num_problems` rows with the columns prompt, solution, expert and depth.

    Row i depends on (seed, split, i) and on the configuration only. `expert_noise` changes the expert column and
    nothing else: the solution is always the true one. Splits share no map, whatever their seeds, sizes and depths: a
    hash of the map says which split it belongs to.
    """
    if split not in SPLITS:
        raise UserError(f"split of pointer_chasing must be one of {list(SPLITS)}, got {split!r}.")
    if num_problems < 1:
        raise UserError(f"num_problems must be at least 1, got {num_problems}.")
    return [_generate_row(config, split, random.Random(f"{seed}/{split}/{i}")) for i in range(num_problems)]


def pointer_chasing_reward(
    prompts: Sequence[str], completions: Sequence[str], solution: Sequence[str], **columns: Any
) -> list[float]:
    """Reward 1.0 where the text from the first `#` to `$` (or the end) is exactly the solution, else 0.0."""
    return [float(_answer(completion) == truth) for completion, truth in zip(completions, solution, strict=True)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the task's character-level tokenizer in memory: one token per character, `$` as end of sequence.

    The vocabulary (28 tokens) does not depend on the configuration. A character outside it is refused.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    depths = "".join(str(depth) for depth in range(1, MAX_DEPTH + 1))
    tokens = [PAD_TOKEN, EOS_TOKEN, *f"{ANSWER_MARK}{PARAGRAPH_BREAK},?:{depths}{NODE_NAMES}"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def _generate_row(config: PointerChasingConfig, split: str, rng: random.Random) -> dict[str, Any]:
    nodes = NODE_NAMES[: config.num_nodes]
    successor = _draw_cycle(nodes, rng)
    while _split_of(successor) != split:
        successor = _draw_cycle(nodes, rng)
    start, depth = rng.choice(nodes), rng.choice(config.depths)
    listing = rng.sample(nodes, len(nodes))
    prompt = ",".join(node + successor[node] for node in listing) + f"?{start}{depth}:"
    # The expert draws last, so that expert_noise leaves prompt and solution as they are.
    clean = _walk(successor, start, depth, 0.0, rng)
    noisy = _walk(successor, start, depth, config.expert_noise, rng)
    expert = PARAGRAPH_BREAK.join(noisy) + ANSWER_MARK + noisy[-1] + EOS_TOKEN
    return {"prompt": prompt, "solution": clean[-1], "expert": expert, "depth": depth}


def _draw_cycle(nodes: str, rng: random.Random) -> dict[str, str]:
    """Draw uniformly a map node → next node that is one cycle through all nodes."""
    order = rng.sample(nodes, len(nodes))
    return {node: order[(i + 1) % len(order)] for i, node in enumerate(order)}


def _split_of(successor: dict[str, str]) -> str:
    digest = hashlib.sha256("".join(successor[node] for node in sorted(successor)).encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def _walk(successor: dict[str, str], start: str, depth: int, noise: float, rng: random.Random) -> list[str]:
    """Return the steps of a walk, each written as the node it leaves and the node it reaches."""
    steps, node = [], start
    for _ in range(depth):
        reached = successor[node]
        if rng.random() < noise:
            reached = rng.choice(sorted(successor))
        steps.append(node + reached)
        node = reached
    return steps


def _answer(completion: str) -> str | None:
    _, mark, rest = completion.partition(ANSWER_MARK)
    return rest.partition(EOS_TOKEN)[0] if mark else None
