"""The Band operator, the published clipping rules and chunked log-probs; needs torch alone, copy the folder to use it.

from bandpo.band import band_bounds                   # clip bounds of every token from a trust region
from bandpo.rule import check_rule, load_rule         # any published rule or your own, behind one interface
from bandpo.logprobs import token_logprobs            # log-probs and entropy without the logits of all tokens
"""
