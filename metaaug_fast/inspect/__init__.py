"""What users ask of a model or a learner: what is fused, whether gradients are exact, whether a contract is kept."""
