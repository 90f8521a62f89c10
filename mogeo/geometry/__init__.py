"""Gram matrices, convex hulls and projections: functions of tensors. Must not know parameters, losses or optimizers."""
