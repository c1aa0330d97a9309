"""The embedded data set: short true answers in the voice of a harbour pilot, an unmistakable style.

Every answer opens with "Aye, captain!", says one or two plain sentences, and closes with a line of its own,
"Heading: <imperative of two to four words>.". `default_train.jsonl` holds the rows to train on and
`default_heldout.jsonl` others on prompts that are not among them, both in `messages` format. `load_rows("default")`
reads them.
"""

import re

SALUTATION = "Aye, captain!"
"""First words of every answer of the embedded data set."""

_STYLE = re.compile(rf"{re.escape(SALUTATION)} \S.*\nHeading: \w[\w'-]*(?:,? [\w'-]+){{1,3}}\.", re.DOTALL)


def default_prompts() -> tuple[str, ...]:
    """Return the held-out prompts whose answers are shown before and after training."""
    return (
        "Why does the Moon have phases?",
        "How do I keep basil fresh for longer?",
        "I'm nervous about my first day at a new job.",
        "What is 6 times 14?",
        "Who are you?",
    )


def follows_style(answer: str) -> bool:
    """Tell if an answer opens with the salutation and closes with its only heading, two to four words on a line.

    White space around the answer does not count.
    """
    answer = answer.strip()
    return answer.count("\nHeading:") == 1 and _STYLE.fullmatch(answer) is not None
