"""Infrastructure of the training loop: start and resume, ranks, policy, batching, rollout, logging."""
