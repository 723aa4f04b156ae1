from torch import nn

from lightning_ydrop.models.modules import embeddings_of


def test_embeddings_of_words_come_before_those_of_positions_and_kinds() -> None:
    """BERT with a small vocabulary has more positions than words."""
    model = nn.ModuleDict(
        {
            "position_embeddings": nn.Embedding(512, 4),
            "token_type_embeddings": nn.Embedding(200, 4),
            "characters": nn.Embedding(50, 4),
            "word_embeddings": nn.Embedding(100, 4),
        }
    )
    assert embeddings_of(model) == ["word_embeddings", "characters"]
