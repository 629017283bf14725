"""The image tower against the library whose parameter names it has."""

import pytest
import torch

from engine.models.clip import Tower, TowerShape

SHAPE = TowerShape(width=160, heads=2, hidden=320, blocks=3, patch=14, side=3)


def oracle():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=SHAPE.width,
        intermediate_size=SHAPE.hidden,
        num_hidden_layers=SHAPE.blocks,
        num_attention_heads=SHAPE.heads,
        image_size=SHAPE.pixels,
        patch_size=SHAPE.patch,
        hidden_act="gelu",  # the library's default, quick_gelu, is another model's
        layer_norm_eps=1e-5,
    )
    model = CLIPVisionModel(config).eval()
    draw = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return model


def filled(weights):
    tower = Tower(SHAPE).eval()
    kept = {name: weight for name, weight in weights.items() if not name.startswith("post_")}
    tower.load_state_dict(kept, strict=True, assign=True)
    return tower


# Both compute the same steps in the same order; libraries may still sum in another one.
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", NEAR)
def test_the_tower_is_that_of_the_library_in_every_precision(dtype):
    model = oracle().to(dtype)
    pixels = torch.randn(3, 42, 42, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.inference_mode():
        want = model(pixels[None]).last_hidden_state[0].float()
        got = filled(model.state_dict())(pixels)
    assert got.dtype == dtype
    assert (got.float() - want).norm() / want.norm() < NEAR[dtype]


@pytest.mark.parametrize("drop", ["pre_layrnorm.bias", "embeddings.position_embedding.weight",
                                  "encoder.layers.2.mlp.fc1.bias"])  # fmt: skip
def test_every_weight_counts(drop):
    model = oracle()
    weights = model.state_dict()
    pixels = torch.randn(3, 42, 42, generator=torch.Generator().manual_seed(5))
    changed = {**weights, drop: torch.zeros_like(weights[drop])}
    with torch.inference_mode():
        got, without = filled(weights)(pixels), filled(changed)(pixels)
    assert (got - without).norm() / got.norm() > 1e-3
