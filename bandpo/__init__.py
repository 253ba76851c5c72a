"""The Band operator, published clipping rules and chunked log-probs. A standalone package that needs only torch.

from bandpo.band import band_bounds                   # clip bounds of every token from a trust region
from bandpo.rule import check_rule, load_rule         # one interface for published rules and your own
from bandpo.logprobs import token_logprobs            # log-probs and entropy without the logits of all tokens
"""
