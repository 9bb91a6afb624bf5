"""The tasks of the classification benchmark: the same for one seed, apart from their test, readable."""

import pytest

from benchmarks.classification.tasks import REGRESSIONS, TASKS, make_files
from tessera.data.labels import class_names, parse_labelled, scores


@pytest.mark.parametrize("task", TASKS)
def test_a_task_repeats_and_keeps_its_test_apart(task: str) -> None:
    training, test = make_files(task, num_train=60, num_test=40, seed=1)
    assert (training, test) == make_files(task, num_train=60, num_test=40, seed=1)
    assert training != make_files(task, num_train=60, num_test=40, seed=2)[0]
    trained, tested = parse_labelled(training), parse_labelled(test)
    assert (len(trained), len(tested)) == (60, 40)
    assert not {(e.text, e.text_pair) for e in trained} & {(e.text, e.text_pair) for e in tested}
    if task in REGRESSIONS:
        assert set(scores(trained)) <= {0, 1, 2, 3, 4, 5}
    else:
        assert class_names(tested) == class_names(trained)


def test_too_many_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="has only"):
        make_files("topic", num_train=5000, num_test=5000, seed=1)
