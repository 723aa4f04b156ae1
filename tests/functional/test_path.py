import torch

from lightning_ydrop.functional.path import path_points, split_path


def test_points_stand_at_equal_steps_from_start_to_inputs() -> None:
    start, inputs = torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0], [1.0, 7.0]])
    expected = torch.tensor([[1, -1], [1.5, -0.5], [1, 1], [2, 0], [1, 3], [2.5, 0.5], [1, 5], [3, 1], [1, 7]])
    assert torch.equal(path_points(start, inputs, 4), expected)


def test_path_ends_at_the_inputs_exactly() -> None:
    inputs = torch.randn(5, 3, 4)
    for n_steps in (1, 3, 7):
        assert torch.equal(path_points(torch.randn(5, 3, 4), inputs, n_steps)[-5:], inputs)


def test_shared_start_costs_one_row() -> None:
    inputs = torch.randn(5, 3)
    assert len(path_points(torch.zeros(1, 3), inputs, 4)) == 4 * 5 + 1
    assert len(path_points(torch.zeros(5, 3), inputs, 4)) == 5 * 5


def test_splitting_gives_every_sample_its_own_path() -> None:
    inputs = torch.randn(5, 3)
    for start in (torch.ones(1, 3), torch.randn(5, 3)):
        split = split_path(path_points(start, inputs, 4), 5)
        assert split.shape == (5, 5, 3)
        for sample in range(5):
            alone = path_points(start[[sample % len(start)]], inputs[[sample]], 4)
            assert torch.equal(split[:, sample], alone)


def test_a_single_sample_has_the_same_rows_either_way() -> None:
    inputs = torch.randn(1, 3)
    assert split_path(path_points(torch.zeros(1, 3), inputs, 4), 1).shape == (5, 1, 3)
