"""What surrounds the training loop, a subject a file: start and resume, ranks, policy, batching, rollout, log."""
