"""The text encoder: a Transformer of BERT-Base shape, trained jointly with the image backbone."""

from torch import Tensor, nn
from transformers import BertConfig, BertModel

from m3i_scale.models.layers import XavierLinear, init_transformer, require_divisible


class BertEncoder(BertModel):
    """`BertModel` without its pooler, initialised by its owner.

    transformers draws weights after the constructors of the layers, too late for contexts that
    split parameters at that point (see `layers`).
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)

    def _init_weights(self, module: nn.Module) -> None:
        pass


class TextTower(nn.Module):
    """BERT encoder; the first token's last state is projected linearly to `embed_dim`.

    Dropout is off by default: the paper states none, and with it losses
    would depend on how a batch is spread over ranks.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        embed_dim: int,
        width: int,
        depth: int,
        heads: int,
        ffn: int,
        max_length: int,
        dropout: float = 0.0,
        pad_id: int = 0,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        require_divisible("text width", width, "heads", heads)
        if not 0 <= pad_id < vocab_size:
            raise ValueError(f"pad_id={pad_id}: must lie in the vocabulary, 0 to {vocab_size - 1}")
        self.max_length = max_length
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=ffn,
            max_position_embeddings=max_length,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=pad_id,
            attn_implementation="sdpa",
        )
        self.bert = BertEncoder(config)
        self.bert.apply(init_transformer)
        if checkpoint_blocks:
            _enable_checkpointing(self.bert)
        self.projection = XavierLinear(width, embed_dim, bias=False)

    def forward(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Encode tokens int64 (B, L), mask bool (B, L) True on real ones -> (B, E), not normalised.

        Every row must have at least its first token ([CLS]).
        """
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f"texts of {tokens.shape[1]} tokens: this tower takes at most {self.max_length}; "
                "shorten them or raise max_length"
            )
        # Expand the mask here: BERT reads the values of a 2-D mask, and that waits for the GPU.
        mask = token_mask[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        states = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        return self.projection(states[:, 0])


def _enable_checkpointing(bert: BertModel) -> None:
    # The method was renamed within transformers 5.
    enable = getattr(bert, "activation_checkpointing_enable", bert.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
