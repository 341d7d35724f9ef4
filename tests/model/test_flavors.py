"""Named sizes against the parameter counts that their releases publish."""

from __future__ import annotations

import pytest
import torch

from megastage.model.decoder import Decoder
from megastage.model.flavors import FLAVORS, get_flavor
from megastage.model.parameters import count_parameters, parameter_shapes

PUBLISHED = {
    ("llama3", "1B"): 1_235_814_400,
    ("llama3", "3B"): 3_212_749_824,
    ("llama3", "8B"): 8_030_261_248,
    ("llama3", "70B"): 70_553_706_496,
    ("llama3", "405B"): 405_853_388_800,
    ("qwen3", "0.6B"): 596_049_920,
    ("qwen3", "1.7B"): 1_720_574_976,
    ("qwen3", "4B"): 4_022_468_096,
    ("qwen3", "8B"): 8_190_735_360,
    ("qwen3", "14B"): 14_768_307_200,
    ("qwen3", "32B"): 32_762_123_264,
}
ALL = [(name, flavor) for name, flavors in FLAVORS.items() for flavor in flavors]


@pytest.mark.parametrize(("name", "flavor"), ALL)
def test_parameter_count(name: str, flavor: str) -> None:
    count = count_parameters(get_flavor(name, flavor))
    if flavor == "debugmodel":
        assert 1e6 < count < 1e7
    else:
        assert count == PUBLISHED[name, flavor]


@pytest.mark.parametrize(("name", "flavor"), ALL)
def test_shapes_are_those_of_the_decoder(name: str, flavor: str) -> None:
    cfg = get_flavor(name, flavor)
    for part in ({"layers": range(2), "has_head": False}, {"layers": (2,), "has_embedding": False}):
        with torch.device("meta"):
            model = Decoder(cfg, **part)
        built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert built == parameter_shapes(cfg, **part)
        assert list(built) == list(parameter_shapes(cfg, **part))


def test_another_vocabulary() -> None:
    assert get_flavor("llama3", "8B", vocab_size=50_257).vocab_size == 50_257


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(ValueError, match=r'model\.name = "gpt2" .* llama3, qwen3'):
        get_flavor("gpt2", "8B")
    with pytest.raises(ValueError, match=r'model\.flavor = "7B" .* qwen3: use one of debugmodel, 0\.6B'):
        get_flavor("qwen3", "7B")
