"""Compiled blocks: the number of graphs, and drop path that stays what it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mae_scale.models import build_classifier, build_mae
from mae_scale.models.classifier import Classifier
from mae_scale.models.compiled import GraphDropPath, compile_blocks

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the graphs that `compile_blocks` leads to; they run as they were traced."""
    found: list[Any] = []
    compile_ = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=backend, **kw))
    return found


def classifier(**kwargs: Any) -> Classifier:
    return build_classifier("mae_vit_tiny_patch16", 10, **{**SIZES, **kwargs})


def test_a_deep_classifier_with_drop_path_has_two_graphs(graphs: list[Any]) -> None:
    """There is one graph for training and one for evaluation, not one for each of the 24 rates."""
    model = classifier(depth=24, drop_path=0.3)
    keys = set(model.state_dict())
    model.eval()
    expected = model(IMAGES)
    compile_blocks(model)
    assert set(model.state_dict()) == keys
    for _ in range(2):
        model.train()
        model(IMAGES).sum().backward()
        model.eval()
        with torch.no_grad():
            found = model(IMAGES)
    assert len(graphs) == 2
    torch.testing.assert_close(found, expected)


def test_encoder_and_decoder_have_a_graph_each(graphs: list[Any]) -> None:
    model = build_mae("mae_vit_tiny_patch16", **SIZES, depth=6, decoder_depth=3)
    compile_blocks(model)
    model(IMAGES, torch.rand(2, 16))[0].backward()
    assert len(graphs) == 2


def test_rates_of_a_model_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = classifier(depth=3, drop_path=0.4)
        compile_blocks(model)
    model.to_empty(device="cpu")
    model.initialize_weights()
    rates = [float(m.rate) for m in model.modules() if isinstance(m, GraphDropPath)]
    assert rates == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])


def test_paths_are_dropped_at_their_rate_and_scaled() -> None:
    torch.manual_seed(0)
    drop = GraphDropPath(0.3)
    out = drop(torch.ones(20_000, 2, 2))
    assert set(out.unique().tolist()) == {0.0, out.max().item()}
    assert out.max().item() == pytest.approx(1 / 0.7)
    assert float((out[:, 0, 0] == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(out[:, :1, :1].expand_as(out), out)  # whole samples
    assert torch.equal(drop.eval()(out), out)


def test_compiled_blocks_take_one_graph_for_the_encoder_and_one_for_the_decoder() -> None:
    """The depth and the recomputed blocks do not change the number of graphs."""
    torch._dynamo.reset()
    small = {"img_size": 32, "patch_size": 8, "depth": 4, "decoder_depth": 3}
    model = build_mae("mae_vit_tiny_patch16", **small)
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    expected = model(images, noise)[0]
    keys = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == keys
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for every in ("none", "full"):
        model.set_activation_checkpointing(every)
        loss = model(images, noise)[0]
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert graphs["unique_graphs"] - before == 2
