"""Band-clipped policy optimisation, and the rules published beside it, as plain functions of tensors: copy this folder
into any trainer, with torch.

    from bandpo.band import band_bounds            # the ratio interval of every token
    from bandpo.objective import policy_loss       # the clipped loss, given that interval
    from bandpo.rules import load_rule             # any published rule, or one's own, behind one interface

`band` the operator, `objective` the loss around it, `rule` what a rule is, `rules` the published ones, `radius` one
per token or per step, `logprobs` log-probs and entropy without logits of the whole batch, `plot` the pictures.
"""
