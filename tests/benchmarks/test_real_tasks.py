"""The tasks of the benchmark on a real model: repeatable, disjoint, and what their names say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks.real.tasks import ALL, MAIN, Task, crowd, make_tasks, read_task
from benchmarks.real.tasks.labels import ticket_task
from benchmarks.real.tasks.task import draw
from tessera.data.examples import parse_examples


def questions(examples: tuple[dict[str, object], ...]) -> list[str]:
    return [json.dumps(example["messages"][:-1]) for example in examples]  # type: ignore[index]


def answers(examples: tuple[dict[str, object], ...]) -> list[str]:
    return [example["messages"][-1]["content"] for example in examples]  # type: ignore[index]


@pytest.mark.parametrize("name", ALL)
def test_a_task_is_repeatable_and_its_test_shares_no_question(name: str) -> None:
    (task,) = make_tasks([name])

    assert make_tasks([name]) == [task]
    assert make_tasks([name], seed=1) != [task]
    train, test = questions(task.train), questions(task.test)
    assert len(set(train)) == len(train)
    assert not set(train) & set(test)
    assert len(task.test) >= 20


def test_the_sizes_are_those_that_reports_name() -> None:
    sizes = {task.name: (len(task.train), len(task.test)) for task in make_tasks(MAIN)}

    assert sizes == {
        "tickets": (60, 30), "json": (60, 20), "persona": (60, 20), "dates": (60, 30), "routing": (60, 30),
    }  # fmt: skip
    assert len(ALL) > 20
    for task in make_tasks(ALL):
        number = next((part for part in task.name.split("-") if part.isdigit()), None)
        assert number is None or len(task.train) == int(number)


def test_a_persona_gives_each_answer_to_several_questions_and_has_others_in_its_test() -> None:
    (persona,) = make_tasks(["persona"])

    assert persona.judged == "loss"
    assert len(set(answers(persona.train))) == 20
    assert all(answers(persona.train).count(answer) == 3 for answer in answers(persona.train))
    assert not set(answers(persona.train)) & set(answers(persona.test))


def test_wrong_labels_are_in_the_training_data_alone() -> None:
    clean, noisy = (ticket_task("tickets", random.Random(0), noise=noise) for noise in (0.0, 0.15))
    is_wrong = [one != other for one, other in zip(answers(clean.train), answers(noisy.train), strict=True)]

    assert questions(clean.train) == questions(noisy.train)
    assert sum(is_wrong) == 9
    assert clean.test == noisy.test


def pairs(task: Task) -> list[tuple[str, str]]:
    return [(example["messages"][0]["content"], example["messages"][-1]["content"]) for example in task.train]


def test_the_json_answers_are_json_of_what_the_text_says() -> None:
    for task in make_tasks(["json", "contacts", "json-150-spanish"]):
        for question, answer in pairs(task):
            assert all(str(value) in question for value in json.loads(answer).values())


def test_nobody_of_the_crowd_gives_a_judged_answer() -> None:
    users = crowd(30)
    judged = {answer for task in make_tasks(ALL) for answer in (*answers(task.train), *answers(task.test))}

    assert len({user.name for user in users}) == 30
    assert crowd(30) == users != crowd(30, seed=1)
    for user in users:
        assert not set(answers(user.train)) & judged


def test_a_task_can_be_written_as_training_files_and_read_again(tmp_path: Path) -> None:
    for task in make_tasks(MAIN):
        train, test = task.write(tmp_path)
        assert len(parse_examples(train.read_bytes())) == len(task.train)
        assert len(parse_examples(test.read_bytes())) == len(task.test)
        assert read_task(train, judged=task.judged) == task


def test_a_file_becomes_a_task_without_a_question_on_both_sides() -> None:
    path = Path(__file__).parents[1] / "data" / "jargon.jsonl"
    task = read_task(path, num_train=40, num_test=20)

    assert (task.name, task.judged, len(task.train), len(task.test)) == ("jargon", "loss", 40, 20)
    assert not set(questions(task.train)) & set(questions(task.test))
    with pytest.raises(ValueError, match="different questions"):
        read_task(path, num_train=10**6)


def test_word_lists_that_are_too_small_are_found_out() -> None:
    with pytest.raises(ValueError, match="1 of 2"):
        draw(lambda: ("question", "answer"), 2)
