"""A HypeNet for the library transformers. support/export.py copies this file beside hypenet.py and kernel.py.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The model itself is HypeNet. This file adds the arguments, cache and results that transformers expects.
A column of a batch may be padding. Padding never enters the model: each row is read without its padding, so
every token keeps its own position. Therefore padding may stand on either side, or between tokens.
"""
import copy

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .hypenet import HypeNet, HypeNetConfig
from .kernel import chunked_scan  # noqa: F401 (transformers copies only files that are imported here)

SEGMENT = 1024                       # tokens read at a time: bounds the memory of attention's masks
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"   # versions differ
REFUSED = ("inputs_embeds", "position_ids", "output_attentions", "output_hidden_states")


class HypeNetCache(Cache):
    """All that the rows of a batch have read. get_seq_length counts columns, padding included, because
    transformers counts columns. Our State counts the tokens of each row."""
    is_linear = [False]
    is_compileable = is_croppable = False

    def __init__(self, max_tokens=0):
        """max_tokens: how many tokens to make room for at first. A full cache doubles its room."""
        super().__init__(layers=[])
        self.max_tokens, self.columns, self.state = max_tokens, 0, None

    def get_seq_length(self, layer_idx=0):
        return self.columns

    def crop(self, *args):
        raise ValueError("a HypeNetCache cannot forget its last tokens; generate without an assistant")

    def reorder_cache(self, beam_idx):
        """Row i goes on from what row beam_idx[i] has read."""
        for tensors in (vars(self.state), *self.state.layers):
            for name, t in tensors.items():
                if torch.is_tensor(t):
                    tensors[name] = t.index_select(0, beam_idx.to(t.device))

    def make_room(self, model, batch_size, n):
        """The State, with room for n more columns."""
        old, needed = self.state, self.columns + n
        if old is None:
            self.state = model.init_state(batch_size, max(needed, self.max_tokens))
        elif needed > old.max_tokens:
            self.state = model.init_state(batch_size, max(needed, 2 * old.max_tokens))
            self.state.pos.copy_(old.pos)
            for layer, old_layer in zip(self.state.layers, old.layers):
                for name, t in old_layer.items():    # a slot keeps its number. A ring that has turned
                    layer[name][:, :t.size(1)] = t   # is as large as the window, so it stays as is
        return self.state


class HypeNetForCausalLMConfig(PretrainedConfig):
    """The field `hypenet` holds our HypeNetConfig. The other fields are for transformers and its users."""
    model_type = "hypenet"


class HypeNetForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HypeNetForCausalLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["HypeNet"]      # one device holds the model, because State changes in place
    _supports_sdpa = True
    _is_stateful = True                  # refuses an assistant model, whose guesses must be undone

    def __init__(self, config):
        super().__init__(config)
        self.model = HypeNet(HypeNetConfig(**config.hypenet))
        self.post_init()

    def _init_weights(self, module):
        """Does nothing: HypeNet has already given its weights their first values."""

    def get_input_embeddings(self):
        return self.model.wte

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_tokens):
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = HypeNetCache(max_tokens)

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=None, past_key_values=None,
                logits_to_keep=0, **others):
        """input_ids (B,T) -> logits (B,T,vocab_size), and the cache if use_cache. attention_mask (B, columns
        of the cache + T) is 0 for padding. At padding after a token, logits are those of the last token."""
        wrong = [name for name in REFUSED if others.get(name) is not None and others[name] is not False]
        if wrong:
            raise ValueError(f"a HypeNet takes no {', '.join(wrong)}; leave these arguments out")
        given = others.pop("cache", past_key_values)
        cache = HypeNetCache() if given is None and use_cache else given
        mask = token_mask(input_ids, attention_mask, cache)
        x = self.read_whole(input_ids, mask) if cache is None else self.read_on(input_ids, mask, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(x[:, kept])
        loss = None if labels is None else self.loss_function(
            logits=logits, labels=labels, vocab_size=logits.size(-1), **others)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def read_whole(self, idx, mask):
        """x (B,T,C) of rows that begin here. The tokens of each row move to the front of the row. The padding
        behind the tokens then changes nothing, because no token sees a later one."""
        if mask is None:
            return self.model.hidden(idx)
        order = mask.int().argsort(dim=1, descending=True, stable=True)
        longest = int(mask.sum(1).max())
        x = self.model.hidden(idx.gather(1, order)[:, :longest])
        return x.gather(1, token_numbers(mask)[..., None].expand(-1, -1, x.size(-1)))

    def read_on(self, idx, mask, cache):
        """x (B,T,C) of tokens that follow the tokens in the cache. Rows with padding are read one by one."""
        state = cache.make_room(self.model, *idx.shape)
        if mask is None:
            x = read(self.model, idx, state)
        else:
            rows = [read(self.model, idx[b:b + 1, mask[b]], state.row(b))[0] for b in range(len(idx))]
            x = torch.stack([row[i] for row, i in zip(rows, token_numbers(mask))])
        cache.columns += idx.size(1)
        return x


def read(model, idx, state):
    """x (B,T,C) of tokens that follow the tokens in a State. Empty slots cost as much time as full ones. So
    the model gets a view of the State, with only the slots that are full after the segment."""
    parts = []
    for part in idx.split(SEGMENT, 1):
        n_slots = int(state.pos.max()) + part.size(1)
        view = copy.copy(state)
        view.layers = [{name: t if name == "S" else t[:, :n_slots] for name, t in layer.items()}
                       for layer in state.layers]
        parts.append(model.hidden(part, view))
    return torch.cat(parts, 1)


def token_mask(idx, attention_mask, cache):
    """Which columns of idx (B,T) are tokens, (B,T) bool; None if all are. ValueError for other masks."""
    if cache is not None and not isinstance(cache, HypeNetCache):
        raise ValueError(f"the cache is a {type(cache).__name__}; a HypeNet needs a HypeNetCache, or none")
    if attention_mask is None:
        return None
    wanted = len(idx), idx.size(1) + (0 if cache is None else cache.columns)
    if attention_mask.shape != wanted:
        raise ValueError(f"attention_mask has shape {(*attention_mask.shape,)}; allowed: {wanted}")
    mask = attention_mask[:, -idx.size(1):] != 0
    if not mask.any(1).all():
        raise ValueError("attention_mask leaves a row without tokens; give each row at least one")
    return None if mask.all() else mask


def token_numbers(mask):
    """For each column of a mask (B,T) the number of its token in the row, or of the last token before."""
    return (mask.cumsum(1) - 1).clamp(min=0)
