"""`mogeo align`: direct preference optimisation (DPO) with several objectives. Uses mogeo's optimizer as anyone would.

`data` makes preference pairs of rated completions, `tokens` makes token ids of them, `log_probs` scores them with a
model, `losses` makes losses of the scores, and `train.align` is the training loop. Nothing is imported here, so that
`mogeo --help` does not have to wait for torch and transformers.
"""
