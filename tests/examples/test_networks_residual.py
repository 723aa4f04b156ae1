import pytest
import torch

from examples import networks


@pytest.mark.parametrize(("depth", "width", "blocks"), [(10, 0.5, 3), (16, 1, 6), (28, 2, 12)])
def test_depth_counts_convolutions_and_the_head(depth: int, width: float, blocks: int) -> None:
    net = networks.WideResNet(depth, width, num_classes=5, in_channels=1)
    on_path = [each for each in net.modules() if isinstance(each, torch.nn.Conv2d) and each.kernel_size == (3, 3)]
    assert len(on_path) == 2 * blocks + 1
    # The shortcuts that project count as layers too: one for each stage, and the head.
    assert depth == len(on_path) + 3
    assert [len(list(stage.children())) for stage in net.stages] == [blocks // 3] * 3
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 5)
    assert net.head.in_features == round(64 * width)


def test_a_depth_that_no_such_network_has_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=12"):
        networks.WideResNet(12)


def test_the_classifier_trains_and_drops_where_it_is_told() -> None:
    model = networks.ResidualClassifier(p=0.3)
    assert sum(isinstance(each, torch.nn.Dropout) for each in model.modules()) == 3
    assert dict(model.hparams)["depth"] == 10
    x = torch.randn(4, 1, 8, 8)
    assert model(x).shape == (4, 10)
    assert not any(isinstance(each, torch.nn.Dropout) for each in networks.ResidualClassifier().modules())
