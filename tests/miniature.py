"""Every data set of the suites in small: two dozen rows each, in the columns that lm-eval's tasks read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = (
    "ant bee cat dog eel fox gnu hen ibis jay koi lynx mole newt owl pig quail rat seal toad urial vole wasp yak"
).split()
ROWS = len(WORDS)
"""More than twice the examples before a question: some tasks read every other row."""
BIGBENCH = (
    "qa_wikidata misconceptions novel_concepts strange_stories strategyqa conlang_translation "
    "language_identification conceptual_combinations elementary_math_qa dyck_languages cs_algorithms "
    "logical_deduction operators repeat_copy_logic understanding_fables"
).split()
MMLU = (
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security "
    "conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_european_history "
    "high_school_geography high_school_government_and_politics high_school_macroeconomics "
    "high_school_mathematics high_school_microeconomics high_school_physics high_school_psychology "
    "high_school_statistics high_school_us_history high_school_world_history human_aging human_sexuality "
    "international_law jurisprudence logical_fallacies machine_learning management marketing medical_genetics "
    "miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting "
    "professional_law professional_medicine professional_psychology public_relations security_studies sociology "
    "us_foreign_policy virology world_religions"
).split()


def _bigbench(i: int) -> dict[str, Any]:
    right, wrong = WORDS[i], WORDS[i - 1]
    return {"inputs": f"Q: Is a {right} a {right}?\nA:", "targets": [right],
            "multiple_choice_targets": [right, wrong], "multiple_choice_scores": [1, 0]}  # fmt: skip


def _agieval(i: int) -> dict[str, Any]:
    return {"query": f"Q: Which is the {WORDS[i]}? Answer Choices: (A)ant (B){WORDS[i]}\nA: Among A through B",
            "choices": ["(A)ant", f"(B){WORDS[i]}"], "gold": [1]}  # fmt: skip


def _choices(i: int, n: int) -> dict[str, list[str]]:
    return {"text": [WORDS[(i + k) % ROWS] for k in range(n)], "label": [*"ABCDE"[:n]]}


def _arithmetic(i: int) -> dict[str, Any]:
    return {"context": f"\n\nQuestion: What is {i} plus {i}?\n\nAnswer:", "completion": f" {i + i}"}


def _winogender(i: int) -> dict[str, Any]:
    return {"sentence": f"The {WORDS[i]} told the guest that she could go.", "pronoun": "she", "label": i % 2,
            "occupation": WORDS[i], "participant": "guest", "gender": ("female", "male")[i % 2]}  # fmt: skip


def _bbq(i: int) -> dict[str, Any]:
    return {
        "context": f"The {WORDS[i]} and the girl met.", "question": "Who was late?", "question_polarity": "neg",
        "context_condition": ("ambig", "disambig")[i % 2], "category": "Age", "label": i % 3,
        "ans0": "The girl", "ans1": "The man", "ans2": "Unknown",
        "answer_info": {"ans0": ["girl", "young"], "ans1": ["man", "old"], "ans2": ["unknown", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["old"]},
    }  # fmt: skip


def _squad(i: int) -> dict[str, Any]:
    return {"text": f"The {WORDS[i]} sat on the mat. What sat on the mat was the", "value": WORDS[i]}


def _coqa(i: int) -> dict[str, Any]:
    return {
        "story": f"A {WORDS[i]} sat on a mat.",
        "questions": {"input_text": ["Who sat?", "On what?"]},
        "answers": {"input_text": [f"a {WORDS[i]}", "a mat"]},
        "additional_answers": {"0": {"input_text": ["it", "the mat"]}},
    }


ALL = ("train", "validation", "test")
SETS: dict[str, tuple[tuple[str, ...], Callable[[int], dict[str, Any]]]] = {
    "Rowan/hellaswag": (ALL, lambda i: {
        "ctx_a": f"A {WORDS[i]} sits.", "ctx_b": "it", "activity_label": "Sitting", "label": str(i % 4),
        "endings": [f"runs to a {WORDS[(i + k) % ROWS]} [step] away." for k in range(4)]}),
    "allenai/ai2_arc/ARC-Easy": (ALL, lambda i: {
        "question": f"Which is a {WORDS[i]}?", "choices": _choices(i, 4), "answerKey": "ABCD"[i % 4]}),
    "allenai/ai2_arc/ARC-Challenge": (ALL, lambda i: {
        "question": f"Why is it a {WORDS[i]}?", "choices": _choices(i, 4), "answerKey": "ABCD"[i % 4]}),
    "aps/super_glue/copa": (ALL, lambda i: {
        "premise": f"The {WORDS[i]} ran.", "question": ("cause", "effect")[i % 2], "choice1": "It was late.",
        "choice2": "It was wet.", "label": i % 2}),
    "aps/super_glue/boolq": (ALL, lambda i: {
        "passage": f"A {WORDS[i]} is small.", "question": f"is a {WORDS[i]} small", "label": i % 2}),
    "tau/commonsense_qa": (ALL, lambda i: {
        "question": f"Where is the {WORDS[i]}?", "choices": _choices(i, 5), "answerKey": "ABCDE"[i % 5]}),
    "baber/piqa": (ALL, lambda i: {"goal": f"Feed a {WORDS[i]}", "sol1": "Corn.", "sol2": "Sing.", "label": i % 2}),
    "allenai/openbookqa/main": (ALL, lambda i: {
        "question_stem": f"A {WORDS[i]} needs", "choices": _choices(i, 4), "answerKey": "ABCD"[i % 4]}),
    "EleutherAI/lambada_openai/default": (("test",), lambda i: {"text": f"The {WORDS[i]} saw the {WORDS[i]}"}),
    "lighteval/winograd_wsc/wsc273": (("test",), lambda i: {
        "text": f"The {WORDS[i]} fed the fox because it was kind.", "pronoun": "it", "label": i % 2,
        "pronoun_loc": len(f"The {WORDS[i]} fed the fox because "), "options": [f"The {WORDS[i]}", "The fox"]}),
    "allenai/winogrande/winogrande_xl": (ALL, lambda i: {
        "sentence": f"The {WORDS[i]} fed the fox because _ was kind.", "option1": f"the {WORDS[i]}",
        "option2": "the fox", "answer": str(1 + i % 2)}),
    "hazyresearch/based-squad/default": (("validation",), _squad),
    "EleutherAI/coqa": (("train", "validation"), _coqa),
    "mandarjoshi/trivia_qa/rc.nocontext": (("train", "validation"), lambda i: {
        "question": f"Which animal is a {WORDS[i]}", "answer": {"aliases": [WORDS[i], WORDS[i].title()]}}),
    "google-research-datasets/nq_open": (("train", "validation"), lambda i: {
        "question": f"which animal is a {WORDS[i]}", "answer": [WORDS[i]]}),
    "lighteval/siqa": (("train", "validation"), lambda i: {
        "context": f"Kim fed a {WORDS[i]}.", "question": "Why?", "answerA": "to help", "answerB": "to sing",
        "answerC": "to sleep", "label": str(1 + i % 3)}),
    "regisss/math_qa": (ALL, lambda i: {
        "Problem": f"what is {i} plus 1?", "options": f"a ) {i} , b ) {i + 1} , c ) {i + 2} , d ) {i + 3} , e ) none",
        "correct": "b"}),
    "EleutherAI/logiqa/logiqa": (ALL, lambda i: {
        "context": f"All {WORDS[i]}s run.", "question": "What runs?", "options": [WORDS[i], "a", "b", "c"],
        "label": "a"}),
    "openai/gsm8k/main": (("train", "test"), lambda i: {
        "question": f"What is {i} + 1?", "answer": f"It is {i} + 1 = {i + 1}.\n#### {i + 1}"}),
    "EleutherAI/asdiv": (("validation",), lambda i: {
        "body": f"Kim has {i} hens.", "question": "How many hens?", "answer": f"{i} (hens)"}),
    "bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source": (ALL, lambda i: {
        "CONTEXTS": [f"A {WORDS[i]} slept.", "It woke."], "QUESTION": "Did it wake?",
        "final_decision": ("yes", "no", "maybe")[i % 3]}),
    "oskarvanderwal/winogender/all": (("test",), _winogender),
    "oskarvanderwal/bbq/All": (("test",), _bbq),
    "skg/toxigen-data/annotated": (("train", "test"), lambda i: {
        "text": f"a {WORDS[i]} is bad", "toxicity_ai": float(i % 6), "toxicity_human": 1.0}),
    **{f"hails/bigbench/{name}_zero_shot": (("default",), _bigbench) for name in BIGBENCH},
    **{f"hails/agieval-{name}": (("test",), _agieval)
       for name in ("lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-math", "aqua-rat")},
    **{f"cais/mmlu/{name}": (("dev", "test"), lambda i: {
        "question": f"Which is a {WORDS[i]}?", "choices": _choices(i, 4)["text"], "answer": i % 4}) for name in MMLU},
}  # fmt: skip
FILES = {f"EleutherAI/arithmetic/data/{name}_digit_addition.jsonl": _arithmetic for name in ("two", "three")}


def write(folder: Path) -> Path:
    """All of them under the folder; the folder."""
    files = {f"{name}/{split}.jsonl": row for name, (splits, row) in SETS.items() for split in splits} | FILES
    for name, row in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row(i)) + "\n" for i in range(ROWS)))
    return folder
