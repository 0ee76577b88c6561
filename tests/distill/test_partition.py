"""Partitions: disjoint, complete, of equal size, the same on every machine and after a file."""

import pytest
import torch

from diffaccel.core.errors import DataError, UsageError
from diffaccel.distill.partition import blocks, choose_partition, features, kmeans, members, quadrants
from diffaccel.models.conditions import ClassConditions, NoConditions, PromptConditions
from diffaccel.models.partition import pooled, read_partition


def prompts(count=240, tokens=5, width=6) -> PromptConditions:
    """Prompts whose states are spread unevenly: two lumps and a tail."""
    random = torch.Generator().manual_seed(0)
    states = torch.randn(count, tokens, width, generator=random) * torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5, 0.1])
    states[: count // 5] += 9.0
    return PromptConditions([f"prompt {index}" for index in range(count)], {"encoder_hidden_states": states})


def sizes(partition, conditions) -> list[int]:
    parts = [members(partition, conditions, student) for student in range(partition.students)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(conditions.count))  # disjoint and complete
    return [len(part) for part in parts]


@pytest.mark.parametrize("students", [1, 2, 3, 4, 7, 10])
def test_blocks_of_classes_are_consecutive_and_of_equal_size(students):
    partition = blocks(10, students)
    found = sizes(partition, ClassConditions(10))
    assert max(found) - min(found) <= 1
    assert torch.equal(partition.owners, partition.owners.sort().values)


@pytest.mark.parametrize("students", [1, 2, 4, 8])
def test_quadrants_of_prompts_are_of_equal_size(students):
    conditions = prompts()
    found = sizes(choose_partition("auto", conditions, students), conditions)
    assert max(found) - min(found) <= 1


def test_quadrants_are_signs_against_medians_of_the_first_principal_directions():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 3.0]) + 7.0
    partition = quadrants(x, 4)
    expected = 2 * (x[:, 1] > x[:, 1].median()).long() + (x[:, 2] > x[:, 2].median()).long()
    assert (partition.route(x) == expected).float().mean() > 0.97


@pytest.mark.parametrize("students", [3, 5])
def test_kmeans_balances_the_parts_and_keeps_what_belongs_together(students):
    conditions = prompts()
    partition = choose_partition("auto", conditions, students)
    assert partition.kind == "kmeans"
    found = sizes(partition, conditions)
    assert max(found) - min(found) <= 0.05 * conditions.count
    x = features(conditions)

    def spread(owner) -> float:
        return sum(float((x[owner == k] - x[owner == k].mean(0)).square().sum()) for k in range(students))

    assert spread(partition.route(x)) < 0.8 * spread(torch.arange(len(x)) % students)


def test_kmeans_without_balance_would_be_uneven():
    conditions = prompts()
    partition = kmeans(features(conditions), 3)
    nearest = torch.cdist(features(conditions).double(), torch.tensor(partition.centroids, dtype=torch.float64)).argmin(
        1
    )
    assert max(nearest.bincount()) > 1.2 * max(sizes(partition, conditions))


@pytest.mark.parametrize("wanted", ["blocks", "quadrants", "kmeans"])
def test_a_partition_is_the_same_after_its_file(tmp_path, wanted):
    conditions = ClassConditions(10) if wanted == "blocks" else prompts()
    partition = choose_partition(wanted, conditions, 4)
    partition.save(tmp_path)
    again = read_partition(tmp_path)
    assert again == partition == choose_partition(str(tmp_path / "partition.json"), conditions, 4)
    assert torch.equal(again.route(features(conditions)), partition.route(features(conditions)))
    assert again.agrees(partition)
    assert not again.agrees(choose_partition(wanted, conditions, 2))


def test_unseen_prompts_have_an_owner_each_independent_of_the_others():
    partition = choose_partition("auto", prompts(), 4)
    states = pooled(torch.randn(50, 5, 6, generator=torch.Generator().manual_seed(1)))
    whole = partition.route(states)
    assert torch.equal(whole, torch.cat([partition.route(one[None]) for one in states]))
    assert len(whole.unique()) > 1


def test_a_table_of_classes_is_taken_from_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("students: [[0, 9, 4], [1, 2, 3, 5, 6, 7, 8]]\n")
    partition = choose_partition(str(file), ClassConditions(10), 2)
    assert partition.route(torch.tensor([4, 5, 9])).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("[[0, 1], [2, 3]]", ["no student has 4, 5"]),
        ("[[0, 1, 2, 3], [3, 4, 5, 0]]", ["more than one student has 0, 3"]),
        ("[[0, 1, 2, 3], [4, 5, 6, cat]]", ["6, cat", "0 … 5"]),
        ("[[0, 1, 2, 3, 4, 5], []]", ["nothing", "student 1"]),
        ("[[0, 1, 1, 2], [7]]", ["3, 4, 5", "more than one student has 1", "7"]),
        ("five", ["students: [["]),
    ],
)
def test_a_table_that_does_not_divide_the_classes_is_refused_with_their_names(tmp_path, rows, words):
    file = tmp_path / "mine.yaml"
    file.write_text(f"students: {rows}\n")
    with pytest.raises(DataError) as caught:
        choose_partition(str(file), ClassConditions(6), 2)
    assert all(word in str(caught.value) for word in [*words, "mine.yaml"])


@pytest.mark.parametrize(
    ("wanted", "conditions", "students", "word"),
    [
        ("quadrants", ClassConditions(10), 4, "blocks"),
        ("blocks", prompts(), 4, "quadrants"),
        ("quadrants", prompts(), 3, "kmeans"),
        ("auto", ClassConditions(3), 4, "lower method.students"),
        ("auto", NoConditions(), 2, "method.students=1"),
        ("quadrant", ClassConditions(10), 4, "quadrant"),
    ],
)
def test_what_cannot_be_divided_is_refused(wanted, conditions, students, word):
    with pytest.raises(UsageError, match=word):
        choose_partition(wanted, conditions, students)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "no", '{"kind": "classes"}', '{"kind": "pie", "params": {}}', '{"kind": "classes", "params": {"members": 3}}',
             '{"kind": "kmeans", "params": {"centroids": [[1.0, 2.0], [3.0]], "prices": [0.0, 0.0]}}',
             '{"kind": "kmeans", "params": {"centroids": [[1.0]], "prices": [0.0, 0.0]}}',
             '{"kind": "quadrants", "params": {"directions": [[1.0]], "cuts": [["x"]]}}'],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "partition.json").write_text(text)
    with pytest.raises(DataError, match=r"partition\.json"):
        read_partition(tmp_path)


def test_a_class_without_owner_cannot_be_drawn():
    with pytest.raises(UsageError, match="guidance"):
        blocks(10, 4).route(torch.tensor([3, 10]))
