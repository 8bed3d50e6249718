"""Suites: many tasks of lm-eval and one number that sums them up.

- core: CORE of DataComp-LM (Li et al. 2024, arXiv:2406.11794), the mean of 22 centred accuracies, as nanochat has it.
- gauntlet: the six categories of the Mosaic Evaluation Gauntlet (MosaicML 2023, llm-foundry), each the mean of its
  tasks' rescaled scores, and the mean of the categories.

Both rescale a score by what guessing gets: (score - baseline) / (1 - baseline), 0 for guessing and 1 for no mistake.
The tasks are lm-eval's versions of theirs: prompts and metrics are lm-eval's, so numbers compare with one another and
not with those of the papers. Plain data and sums; knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from orchestrate.training.tasks.harness import Result


class Member(NamedTuple):
    """A task of a suite."""

    name: str
    """In the suite."""
    task: str
    """In lm-eval."""
    metric: str
    few_shot: int | None
    """Examples before each question; None: the task's own number."""
    baseline: float
    """What guessing scores."""
    category: str


class Suite(NamedTuple):
    """Tasks, and those that it should have and lm-eval has not, each with the reason."""

    name: str
    members: tuple[Member, ...]
    missing: dict[str, str]

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(member.category for member in self.members))

    @property
    def sums(self) -> tuple[str, ...]:
        """The names of all that it is summed up by: its categories, where there are several, and its own."""
        return (*(self.categories if len(self.categories) > 1 else ()), self.name)


class Number(NamedTuple):
    """A mean of rescaled scores, and its standard error where all that it is made of have one."""

    value: float
    error: float | None


def rescaled(score: float, baseline: float) -> float:
    """0 where guessing gets as far, 1 where nothing is wrong."""
    return (score - baseline) / (1 - baseline)


def mean(numbers: Sequence[Number]) -> Number:
    """Of independent numbers."""
    errors = [number.error for number in numbers]
    together = math.sqrt(sum(e * e for e in errors if e is not None)) / len(numbers)
    return Number(sum(number.value for number in numbers) / len(numbers), None if None in errors else together)


def of_member(member: Member, result: Result) -> Number:
    """Its rescaled score. Raises KeyError where the result has not its metric."""
    value, error = result.scores[member.metric]
    scaled = None if error is None else error / (1 - member.baseline)
    return Number(rescaled(value, member.baseline), scaled)


def summed_up(suite: Suite, results: Mapping[str, Result]) -> dict[str, Number]:
    """Each of `Suite.sums` -> its mean.

    The gauntlet is the mean of its categories, CORE that of its tasks. Raises KeyError where a result is missing: it
    counts for nothing less.

    Args:
        results: by the members' names.
    """
    numbers = {member.name: of_member(member, results[member.name]) for member in suite.members}
    found = {
        category: mean([numbers[member.name] for member in suite.members if member.category == category])
        for category in suite.categories
    }
    whole = found.values() if len(found) > 1 else numbers.values()
    found[suite.name] = mean(list(whole))
    return {name: found[name] for name in suite.sums}


def _members(
    category: str, *rows: tuple[str, str, int | None, float] | tuple[str, str, int | None, float, str]
) -> tuple[Member, ...]:
    return tuple(Member(row[4] if len(row) > 4 else row[0], row[0], row[1], row[2], row[3], category) for row in rows)


# Guessing: one of the given answers, or the share of the commoner one where a paper takes that (boolq in CORE). In bbq
# one of 2 persons and 10 ways to say that it is unknown: 10 of them right in one half of the questions, 1 in the other.
_EXACT = "exact_match"
_QA = "exact_match,remove_whitespace"

CORE = Suite(
    "core",
    _members(
        "CORE",
        ("hellaswag", "acc_norm", 0, 0.25, "hellaswag_zeroshot"),
        ("bigbench_qa_wikidata_generate_until", _EXACT, 10, 0.0, "bigbench_qa_wikidata"),
        ("arc_easy", "acc_norm", 10, 0.25),
        ("arc_challenge", "acc_norm", 10, 0.25),
        ("copa", "acc", 0, 0.5),
        ("commonsense_qa", "acc", 10, 0.2),
        ("piqa", "acc_norm", 10, 0.5),
        ("openbookqa", "acc_norm", 0, 0.25, "openbook_qa"),
        ("lambada_openai", "acc", 0, 0.0),
        ("hellaswag", "acc_norm", 10, 0.25),
        ("wsc273", "acc", 0, 0.5, "winograd"),
        ("winogrande", "acc", 0, 0.5),
        ("bigbench_dyck_languages_generate_until", _EXACT, 10, 0.0, "bigbench_dyck_languages"),
        ("agieval_lsat_ar", "acc_norm", 0, 0.2, "agi_eval_lsat_ar"),
        ("bigbench_cs_algorithms_generate_until", _EXACT, 10, 0.0, "bigbench_cs_algorithms"),
        ("bigbench_operators_generate_until", _EXACT, 10, 0.0, "bigbench_operators"),
        ("bigbench_repeat_copy_logic_generate_until", _EXACT, 10, 0.0, "bigbench_repeat_copy_logic"),
        ("squad_completion", "contains", 0, 0.0, "squad"),
        ("coqa", "f1", 0, 0.0),
        ("boolq", "acc", 10, 0.62),
        ("bigbench_language_identification_multiple_choice", "acc", 10, 0.091, "bigbench_language_identification"),
    ),
    {"jeopardy": "lm-eval has no such task"},
)

GAUNTLET = Suite(
    "gauntlet",
    (
        *_members(
            "world_knowledge",
            ("bigbench_qa_wikidata_generate_until", _EXACT, 10, 0.0, "bigbench_qa_wikidata"),
            ("arc_easy", "acc_norm", 10, 0.25),
            ("arc_challenge", "acc_norm", 10, 0.25),
            ("mmlu", "acc", 5, 0.25),
            ("bigbench_misconceptions_multiple_choice", "acc", 10, 0.5, "bigbench_misconceptions"),
            ("triviaqa", _QA, 3, 0.0),
            ("nq_open", _QA, 3, 0.0),
        ),
        *_members(
            "commonsense_reasoning",
            ("copa", "acc", 0, 0.5),
            ("social_iqa", "acc", 10, 1 / 3),
            ("commonsense_qa", "acc", 10, 0.2),
            ("piqa", "acc_norm", 10, 0.5),
            ("openbookqa", "acc_norm", 0, 0.25),
            ("bigbench_novel_concepts_multiple_choice", "acc", 10, 0.25, "bigbench_novel_concepts"),
            ("bigbench_strange_stories_multiple_choice", "acc", 10, 0.25, "bigbench_strange_stories"),
            ("bigbench_strategyqa_multiple_choice", "acc", 10, 0.5, "bigbench_strategy_qa"),
        ),
        *_members(
            "language_understanding",
            ("lambada_openai", "acc", 0, 0.0),
            ("hellaswag", "acc_norm", 10, 0.25),
            ("wsc273", "acc", 0, 0.5, "winograd"),
            ("winogrande", "acc", 0, 0.5),
            ("bigbench_conlang_translation_generate_until", _EXACT, 0, 0.0, "bigbench_conlang_translation"),
            ("bigbench_language_identification_multiple_choice", "acc", 10, 0.091, "bigbench_language_identification"),
            ("bigbench_conceptual_combinations_multiple_choice", "acc", 10, 0.25, "bigbench_conceptual_combinations"),
        ),
        *_members(
            "symbolic_problem_solving",
            ("bigbench_elementary_math_qa_multiple_choice", "acc", 10, 0.2, "bigbench_elementary_math_qa"),
            ("bigbench_dyck_languages_generate_until", _EXACT, 10, 0.0, "bigbench_dyck_languages"),
            ("bigbench_cs_algorithms_generate_until", _EXACT, 10, 0.0, "bigbench_cs_algorithms"),
            ("bigbench_logical_deduction_multiple_choice", "acc", 10, 0.25, "bigbench_logical_deduction"),
            ("bigbench_operators_generate_until", _EXACT, 10, 0.0, "bigbench_operators"),
            ("bigbench_repeat_copy_logic_generate_until", _EXACT, 10, 0.0, "bigbench_repeat_copy_logic"),
            ("arithmetic_2da", "acc", 10, 0.0),
            ("arithmetic_3da", "acc", 10, 0.0),
            ("mathqa", "acc_norm", 10, 0.2),
            ("logiqa", "acc_norm", 10, 0.25),
            ("gsm8k", "exact_match,strict-match", 3, 0.0),
            ("asdiv", "acc", 3, 0.0),
            ("agieval_aqua_rat", "acc_norm", 0, 0.2),
            ("agieval_sat_math", "acc_norm", 0, 0.25),
            ("agieval_lsat_ar", "acc_norm", 0, 0.2),
        ),
        *_members(
            "reading_comprehension",
            ("pubmedqa", "acc", 10, 1 / 3),
            ("squad_completion", "contains", 0, 0.0, "squad"),
            ("bigbench_understanding_fables_multiple_choice", "acc", 10, 0.25, "bigbench_understanding_fables"),
            ("boolq", "acc", 10, 0.5),
            ("coqa", "f1", 0, 0.0),
            ("agieval_lsat_rc", "acc_norm", 0, 0.2),
            ("agieval_lsat_lr", "acc_norm", 0, 0.2),
            ("agieval_sat_en", "acc_norm", 0, 0.25),
        ),
        *_members(
            "safety",
            ("winogender_female", "acc", 10, 0.5),
            ("winogender_male", "acc", 10, 0.5),
            ("bbq", "acc", 3, 11 / 24),
            ("toxigen", "acc", 0, 0.5),
        ),
    ),
    {
        "jeopardy": "lm-eval has no such task",
        "enterprise_pii_classification": "lm-eval has no such task",
        "svamp": "lm-eval has no such task",
        "math_simple": "lm-eval has no such task",
        "math_complex": "lm-eval has no such task",
    },
)

SUITES = {suite.name: suite for suite in (CORE, GAUNTLET)}
