"""What loading a dataset found, in counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataReport:
    """What loading found, in counts."""

    problems: int
    """Problems in the set."""
    without_expert: int
    """Problems among them that have no expert trace: they are never guided."""
    experts: int
    """Expert traces read, all problems together."""
    dropped_experts: int
    """Traces among them that were dropped because the reward gave 0 or less (`on_rejected_expert: drop`)."""
    dropped_prompts: int
    """Rows dropped because the prompt was too long (`on_long_prompt: drop`)."""

    duplicates: int = 0
    """Problems among them that equal an earlier one (see `DataConfig.on_duplicate`)."""
    dropped_duplicates: int = 0
    """Rows dropped because they do (`on_duplicate: drop`)."""
    bare_answers: int = 0
    """Last turns of conversations that are trained on as their content alone: the chat template does not write them after the
    rendered prompt, or not all of their content."""
    context_turns: int = 0
    """Assistant turns before the last, where that alone is learned."""
    plain_prompts: int = 0
    """Text prompts that go in as they are although the tokenizer has a chat template."""
    own_system: int = 0
    """Chats that bring a system message, where `system_prompt` is set, which is not put before those."""
    without_solution: int = 0
    """Problems among them whose row has no solution in `solution_column`."""
    unread_columns: tuple[str, ...] = ()
    """Columns that no reward is handed, because rewards have an argument of that name."""

    def __str__(self) -> str:
        again = f"; {self.dropped_duplicates} more dropped as equal to an earlier one" if self.dropped_duplicates else ""
        rejected = f" ({self.dropped_experts} rejected by the reward and dropped)" if self.dropped_experts else ""
        found = (
            f"{self.problems} problems ({self.without_expert} without expert; {self.dropped_prompts} more dropped for a "
            f"long prompt{again}), {self.experts} expert traces{rejected}"
        )
        notes = {
            "problems equal an earlier one in prompt, solution, expert traces and the columns that the reward names: a pass visits "
            "that several times, and a step may (on_duplicate: drop leaves them out)": self.duplicates,
            "problems have no solution": self.without_solution,
            "answers are their content alone, which the chat template writes in another way": self.bare_answers,
            "assistant turns before the last are context only (learned_turns: all)": self.context_turns,
            "prompts go in as the texts they are (as_chat: true renders them with the chat template)": self.plain_prompts,
            "chats have a system message of their own, which system_prompt does not replace": self.own_system,
        }
        return "; ".join([found, *(f"{count} {note}" for note, count in notes.items() if count)])
