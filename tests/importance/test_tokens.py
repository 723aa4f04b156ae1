"""Models of tokens, whose paths start at an embedding."""

from typing import Any

import pytest
import torch
from captum.attr import LayerConductance
from torch import Tensor, nn

from lightning_ydrop import (
    CaptumMeasure,
    Conductance,
    ConductanceDropout,
    ConfigurationError,
    Measure,
    Request,
    TargetLogit,
    YDrop,
    layer_conductance,
)

VOCABULARY, WIDTH, CLASSES = 11, 8, 5
IDS = torch.randint(1, VOCABULARY, (6, 7), generator=torch.Generator().manual_seed(0))
IDS[:, 5:] = 0  # padding
IDS[0, 4] = 0
Y = torch.arange(6) % CLASSES


class Encoder(nn.Module):
    """A Transformer encoder that does not look at padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for each in self.encoder.layers:
            each.register_module("dropout", ConductanceDropout(unit_dim=-1))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.predict(self.embedding(ids), ids)

    def predict(self, embedded: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(embedded, src_key_padding_mask=ids == 0).mean(1))
        return logits


class Recurrent(nn.Module):
    """An LSTM over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 10, batch_first=True)
        self.drop, self.head = ConductanceDropout(unit_dim=-1), nn.Linear(10, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.predict(self.embedding(ids), ids)

    def predict(self, embedded: Tensor, ids: Tensor) -> Tensor:
        hidden = self.drop(self.lstm(embedded)[0]) * (ids != 0).unsqueeze(2)
        logits: Tensor = self.head(hidden.tanh().mean(1))
        return logits


class FromEmbeddings(nn.Module):
    """The rest of the model, for an attribution that knows nothing of where the path starts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedded: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = self.model.predict(embedded, ids)
        return logits


def model_of(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return kind().to(dtype)


@pytest.mark.parametrize("kind", [Encoder, Recurrent])
def test_conductance_is_captums_with_the_same_starting_point(kind: type[nn.Module]) -> None:
    model = model_of(kind)
    ours = layer_conductance(model, IDS, Y, interpolate_at="embedding", quadrature="left", n_steps=20, baseline=0.1)
    rest = FromEmbeddings(model.eval())
    embedded = model.get_submodule("embedding")(IDS).detach()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for name, scores in ours.items():
            captums = LayerConductance(rest, model.get_submodule(name)).attribute(
                embedded, 0.1, Y, additional_forward_args=(IDS,), n_steps=20, method="riemann_trapezoid"
            )
            summed = captums.sum(1)
            assert ((scores - summed).norm() / summed.norm()).item() < 1e-7, name
            assert scores.abs().sum() > 0
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("kind", [Encoder, Recurrent])
def test_the_engine_drives_a_model_of_tokens(kind: type[nn.Module]) -> None:
    model = model_of(kind, torch.float32)
    engine = YDrop(model, interpolate_at="embedding", num_samples=6)
    engine.step(IDS, Y)
    expected = layer_conductance(model, IDS, Y, interpolate_at="embedding", n_steps=5)
    for name, layer in engine.layers.items():
        assert layer.active
        assert torch.allclose(engine.scores[name], expected[name].mean(0), atol=1e-6)
    model.train()(IDS).sum().backward()


@pytest.mark.parametrize("max_rows", [2, 5, 20])
def test_chunks_give_the_same(max_rows: int) -> None:
    model = model_of(Recurrent)
    whole = layer_conductance(model, IDS, Y, interpolate_at="embedding", n_steps=10)
    chunked = layer_conductance(model, IDS, Y, interpolate_at="embedding", n_steps=10, max_rows=max_rows)
    assert torch.allclose(whole["drop"], chunked["drop"], atol=1e-12)


def test_a_batch_is_its_samples_one_by_one() -> None:
    model = model_of(Encoder)
    together = layer_conductance(model, IDS, Y, interpolate_at="embedding", n_steps=5)
    for j in range(len(IDS)):
        alone = layer_conductance(model, IDS[[j]], Y[[j]], interpolate_at="embedding", n_steps=5)
        for name in together:
            assert torch.allclose(together[name][[j]], alone[name])


class Samples(Measure):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Request] = []

    def score(self, phase1: Request) -> dict[str, Tensor]:
        self.seen.append(phase1)
        return Conductance().score(phase1)


@pytest.mark.parametrize("batch_size", [1, 5, 6, 12, 64])
def test_phase_1_has_no_more_rows_than_the_batch(batch_size: int) -> None:
    measure = Samples()
    ids = IDS.repeat(11, 1)[:batch_size]
    YDrop(model_of(Recurrent, torch.float32), interpolate_at="embedding", measure=measure).step(ids)
    assert measure.seen[-1].num_samples == max(1, batch_size // 6)
    assert len(measure.seen[-1].inputs[0]) * 6 <= max(batch_size, 6)


@pytest.mark.parametrize("name", ["LayerConductance", "InternalInfluence", "LayerGradientXActivation"])
def test_captums_measures_start_at_the_embedding_too(name: str) -> None:
    model = model_of(Recurrent, torch.float32)
    engine = YDrop(
        model,
        interpolate_at="embedding",
        measure=CaptumMeasure(name),
        quadrature="left",
        num_samples=6,
        objective=TargetLogit(),
    )
    engine.step(IDS, Y)
    assert engine.scores["drop"].std() > 0
    if name == "LayerConductance":
        ours = layer_conductance(model, IDS, Y, interpolate_at="embedding", n_steps=5, quadrature="left")
        assert torch.allclose(engine.scores["drop"], ours["drop"].mean(0), rtol=1e-4, atol=1e-6)


class Twice(Recurrent):
    def forward(self, ids: Tensor) -> Tensor:
        return self.predict(self.embedding(ids) + self.embedding(ids), ids)


class Around(Recurrent):
    def forward(self, ids: Tensor) -> Tensor:
        return self.predict(torch.zeros(len(ids), 7, WIDTH), ids)


@pytest.mark.parametrize(
    ("kind", "interpolate_at", "message"),
    [
        (Recurrent, None, "let the path start at their embeddings, with interpolate_at="),
        (Recurrent, "embeddings", r"interpolate_at='embeddings'.*a module of Recurrent: embedding, lstm"),
        (Recurrent, "", r"interpolate_at=''"),
        (Recurrent, "lstm", r"interpolate_at='lstm'.*put out list\(tuple\(Tensor"),
        (Twice, "embedding", r"called once"),
        (Around, "embedding", r"put out list\(\)"),
    ],
)
def test_paths_that_start_nowhere_are_refused(kind: type[nn.Module], interpolate_at: str | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        YDrop(model_of(kind, torch.float32), interpolate_at=interpolate_at).step(IDS, Y)


def test_nothing_is_left_behind() -> None:
    model = model_of(Encoder, torch.float32)
    layer_conductance(model, IDS, Y, interpolate_at="embedding")
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_the_embeddings_of_the_model_are_suggested() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.words = nn.Embedding(5, 4), nn.Embedding(30, 4)
            self.body = nn.Sequential(nn.Linear(4, 6), ConductanceDropout(), nn.Linear(6, 2))

        def forward(self, ids: Tensor) -> Tensor:
            output: Tensor = self.body(self.words(ids).mean(1))
            return output

    ids = torch.randint(0, 30, (8, 5))
    remedy = "interpolate_at='words' or interpolate_at='positions'"
    with pytest.raises(ConfigurationError, match=remedy):
        YDrop(Tokens()).step(ids, torch.arange(8) % 2)
    with pytest.raises(ConfigurationError, match=remedy):
        layer_conductance(Tokens(), ids, torch.arange(8) % 2, layers=nn.Linear)
    YDrop(Tokens(), interpolate_at="words").step(ids, torch.arange(8) % 2)
