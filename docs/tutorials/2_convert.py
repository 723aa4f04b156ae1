"""
Convert a model of timm or Transformers
=======================================

Put Y-Drop into networks that others wrote, without a change of their code.
"""

# %%
# A vision Transformer of timm
# ----------------------------
# ``convert_dropout`` puts our layers where ordinary dropout stands, and reports what it
# did. It says why it leaves a layer alone. (``YDropCallback(convert=True)`` does the
# same when a fit begins.)
import timm
import torch
from transformers import BertConfig, BertForSequenceClassification

from lightning_ydrop import YDrop, convert_dropout, restore_dropout

# sphinx_gallery_start_ignore
import logging
import warnings

warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
# sphinx_gallery_end_ignore

vit = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=32,
    patch_size=8,
    depth=2,
    num_classes=10,
    drop_rate=0.1,
    proj_drop_rate=0.1,
)
report = convert_dropout(vit)
print(report)

# %%
# Rates follow each layer's own ``p``. In the layers of a Transformer the units are the
# last dimension, which the conversion finds out from the layers around.
#
# Without a Trainer, ``YDrop`` is the engine: one call of ``step`` before your own
# training step.
torch.manual_seed(0)
optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3)
images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
ydrop = YDrop(vit)
for _ in range(20):
    ydrop.step(images, labels)  # measures the units, and sets their rates
    loss = torch.nn.functional.cross_entropy(
        vit(images), labels
    )  # your own training step
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

for name, layer in ydrop.layers.items():
    rate = layer.drop_prob
    print(f"{name:20} {len(rate):4} units, rates {rate.min():.3f} to {rate.max():.3f}")

# %%
# ``restore_dropout`` puts ``nn.Dropout`` back. The state_dict is the same with and
# without.
print(restore_dropout(vit))

# %%
# BERT
# ----
# Between two words there is no path to measure importance along: it starts at the
# words' embeddings. So name the embedding. The network has random
# weights here, so that nothing is downloaded; ``from_pretrained`` gives the same
# module.
bert = BertForSequenceClassification(
    BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
)
print(convert_dropout(bert))

# %%
# The dropout of attention weights stays what it is: its last dimension is positions,
# not units.
words = {
    "input_ids": torch.randint(100, (16, 12)),
    "attention_mask": torch.ones(16, 12, dtype=torch.long),
}
labels = torch.randint(2, (16,))
ydrop = YDrop(bert, interpolate_at="bert.embeddings.word_embeddings")
ydrop.step(words, labels)
print(bert(**words, labels=labels).loss)
for name, layer in ydrop.layers.items():
    print(f"{name:45} {len(layer.drop_prob)} units")

# %%
# In a Trainer, the callback takes the same argument, and an adapter that says where in
# the batch the words are: :doc:`Tokens </how-to/tokens>` has the whole recipe.
